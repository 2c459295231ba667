"""The page itself, as one HTML file."""
