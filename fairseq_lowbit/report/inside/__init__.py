"""One model taken apart: its weights, quantizers and attention."""
