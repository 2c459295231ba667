"""The parts of scripts/bench_accuracy.py: rows, students, training, teachers and results."""
