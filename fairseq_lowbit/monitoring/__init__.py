"""Watching a run while it trains: health of its quantizers and layers, collapse, divergence."""
