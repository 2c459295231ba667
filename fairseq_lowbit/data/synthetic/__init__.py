"""The demo corpus, spoken by a synthesizer."""
