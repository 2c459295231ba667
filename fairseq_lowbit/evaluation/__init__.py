"""Measuring models: quantizer health, teacher health, agreement with a teacher, word probes."""
