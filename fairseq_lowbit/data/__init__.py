"""Audio, manifests, first labels and a demo corpus: everything that happens before training."""
