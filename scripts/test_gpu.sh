#!/usr/bin/env bash
# What only a GPU can show: operators, commands and training there against the CPU, bf16, two
# processes (nccl on two GPUs, gloo on one), and what a step costs in time and memory. Minutes; the
# output says which machine it was. Arguments go to pytest.
#
#   bash scripts/test_gpu.sh
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source scripts/setup.sh

python - <<'EOF' || exit 1
import sys

import torch

if not torch.cuda.is_available():
    sys.exit(f"error: there is no GPU that torch {torch.__version__} can use: nothing was tested")
names = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
print(f"torch {torch.__version__}, CUDA {torch.version.cuda}: {', '.join(names)}")
EOF

python -m pytest -q -m gpu --full "$@"
python scripts/bench_training.py --device cuda --batch 8 --seconds 10 --repeats 20
python scripts/bench_training.py --device cuda --batch 8 --seconds 10 --repeats 20 --updates 4
