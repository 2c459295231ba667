"""What a run says about itself: health, collapse, divergence."""
