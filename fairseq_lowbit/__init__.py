"""Speech models with 1, 2, 4 and 8-bit weights and activations, trained in fairseq.

Importing the package is light: it loads neither torch, fairseq nor Hydra. Every folder below it is
one room with one concern, and imports run one way: quantization (numbers and codes), precision
(which bits where), nn (quantized operators), models, distillation, evaluation, plugin (the only
room that knows fairseq), cli. ``data`` stands by itself.
"""

import sys

__version__ = "0.1.0"

# fairseq imports this package by its --user-dir (`common.user_dir`) and expects tasks, criterions
# and models to be registered by that import alone. Then its own tasks are loaded already; without
# them nobody is waiting for a registration, and loading fairseq here would cost seconds.
if "fairseq.tasks" in sys.modules:
    from fairseq_lowbit.plugin import register

    register()
