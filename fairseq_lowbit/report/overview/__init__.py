"""Many models side by side: quality against cost."""
