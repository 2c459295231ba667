"""The quality of models on held-out audio: agreement with a teacher, masked accuracy, probes."""
