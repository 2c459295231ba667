"""Frozen-feature probes, as SUPERB has them: a learned sum of layers and a small head per task."""
