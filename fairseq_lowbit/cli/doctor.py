"""``fairseq-lowbit doctor``: what is installed, what is wrong with it and how to fix it.

Every check returns a ``Finding`` and survives a broken installation: what it looks for is imported
inside it. fairseq is examined through its metadata and our plugin, never imported here.
"""

from __future__ import annotations

import argparse
import platform
import shutil
import sys
import sysconfig
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path

from fairseq_lowbit import __version__
from fairseq_lowbit.machine import this_machine

HELP = "check the installation; every problem comes with a fix"

PRIMARY_CONFIG = "bitla_w1a1"
# Not resolved: setuptools' strict editable installs link each file, and the links are the package.
PACKAGE_DIR = Path(__file__).absolute().parents[1]
SEARCHPATH_MODULE = "hydra_plugins.fairseq_lowbit_searchpath"

# Optional modules and what they are for.
OPTIONAL_MODULES = {
    "ctc_beam_decoder": "decoding with a language model (pip install 'fairseq-lowbit[lm]')",
    "espeakng_loader": "demo speech (pip install 'fairseq-lowbit[demo]')",
    "jiwer": "word errors (pip install 'fairseq-lowbit[asr]')",
    "onnxruntime": "ONNX files (pip install 'fairseq-lowbit[onnx]')",
    "optuna": "searches by +sweep=optuna (pip install 'fairseq-lowbit[sweep]')",
    "s3prl": "SUPERB (docs/superb.md)",
    "submitit": "sweeps on SLURM by +sweep=submitit (pip install 'fairseq-lowbit[sweep]')",
    "transformers": "quantizing models of Hugging Face (pip install 'fairseq-lowbit[hf]')",
}


@dataclass(frozen=True)
class Problem:
    """Something wrong and how to fix it; ``needed`` if training cannot work without it."""

    what: str
    fix: str
    needed: bool = True


@dataclass(frozen=True)
class Finding:
    """The result of one check: lines to print under a topic, and problems."""

    topic: str
    lines: tuple[str, ...]
    problems: tuple[Problem, ...] = ()


def check_python() -> Finding:
    """Interpreter and this package."""
    return Finding(
        "python",
        (
            f"{platform.python_version()} at {sys.executable}",
            f"fairseq_lowbit {__version__} at {PACKAGE_DIR}",
        ),
    )


def check_torch() -> Finding:
    """Version, build and number of threads of torch, and the GPUs it can use."""
    try:
        import torch
    except ImportError as error:
        fix = "pip install torch; constraints.txt names the version that was tested"
        problem = Problem(f"torch cannot be imported: {error}", fix)
        return Finding("torch", ("not importable",), (problem,))
    build = f"CUDA {torch.version.cuda}" if torch.version.cuda else "CPU build"
    gpus = ", ".join(torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count()))
    version_line = f"{torch.__version__} ({build}), {torch.get_num_threads()} threads"
    return Finding("torch", (version_line, f"GPUs: {gpus or 'none'}"))


def check_fairseq() -> Finding:
    """Which distribution the module ``fairseq`` comes from; whether its command is this one's."""
    spec = find_spec("fairseq")
    if spec is None or spec.origin is None:
        fix = "bash scripts/setup.sh; or pip install fairseq-fixed, which builds from source"
        return Finding("fairseq", ("absent",), (Problem("there is no module fairseq", fix),))
    distributions = [
        f"{name} {found}"
        for name in ("fairseq-fixed", "fairseq")
        if (found := _version(name)) is not None
    ]
    problems = []
    if len(distributions) > 1:
        problems.append(
            Problem(
                f"{' and '.join(distributions)} are both installed into the module fairseq",
                "pip uninstall fairseq fairseq-fixed, then install one of them",
            )
        )
    problems.extend(_command_problems("fairseq-hydra-train"))
    source = " and ".join(distributions) or "no distribution (source tree)"
    return Finding("fairseq", (f"{source} at {Path(spec.origin).parent}",), tuple(problems))


def check_hydra() -> Finding:
    """Versions of Hydra and OmegaConf, and where Hydra looks for our configs."""
    versions = ", ".join(f"{name} {_version(name)}" for name in ("hydra-core", "omegaconf"))
    try:
        searched = config_search_path()
    except ImportError as error:
        problem = Problem(f"Hydra cannot be imported: {error}", "pip install hydra-core==1.3.2")
        return Finding("hydra", (versions,), (problem,))
    ours = [path for provider, path in searched if provider == "fairseq_lowbit"]
    if not ours:
        return Finding("hydra", (versions, "our plugin is not seen"), (_unseen_plugin_problem(),))
    directory = Path(ours[0].removeprefix("file://"))
    problems = []
    if not (directory / f"{PRIMARY_CONFIG}.yaml").is_file():
        fix = "install again: pip install --force-reinstall --no-deps, of a wheel or of -e ."
        problems.append(Problem(f"{directory} holds no {PRIMARY_CONFIG}.yaml", fix))
    if not any(directory.parent.samefile(place) for place in (PACKAGE_DIR, PACKAGE_DIR.parent)):
        what = f"Hydra takes the configs of another copy of fairseq_lowbit than {PACKAGE_DIR}"
        problems.append(
            Problem(what, "pip uninstall fairseq-lowbit, then install the copy you mean")
        )
    return Finding("hydra", (versions, f"configs from {directory}"), tuple(problems))


def check_registration() -> Finding:
    """Registers with fairseq, as fairseq does through ``common.user_dir``."""
    try:
        names = registered_names()
    except Exception as error:  # whatever an import of fairseq can raise is what we report
        problem = Problem(
            f"fairseq_lowbit does not register: {type(error).__name__}: {error}",
            "if this comes from fairseq: pip uninstall fairseq fairseq-fixed, then "
            "bash scripts/setup.sh; else install again: pip install -e .",
        )
        return Finding("registration", ("failed",), (problem,))
    lines = tuple(f"{kind}: {', '.join(found) or 'none'}" for kind, found in names.items())
    problems = tuple(
        Problem(f"no {kind} of fairseq_lowbit are registered", "install it again: pip install -e .")
        for kind, found in names.items()
        if not found
    )
    return Finding("registration", lines, problems)


def check_extras() -> Finding:
    """Optional modules: a missing one is a line, not a problem."""
    lines = []
    for module, purpose in OPTIONAL_MODULES.items():
        state = "present" if find_spec(module) else "absent"
        lines.append(f"{module}: {state}, {purpose}")
    return Finding("extras", tuple(lines), tuple(_torchaudio_problems()))


def check_machine() -> Finding:
    """Processor and its instruction sets."""
    return Finding("machine", (f"{platform.machine()}, {this_machine()}",))


CHECKS: tuple[Callable[[], Finding], ...] = (
    check_python,
    check_torch,
    check_fairseq,
    check_hydra,
    check_registration,
    check_extras,
    check_machine,
)


def config_search_path() -> list[tuple[str, str]]:
    """(provider, path) in the order Hydra searches, with every plugin it finds in effect."""
    from hydra import initialize_config_dir
    from hydra.core.global_hydra import GlobalHydra

    # Hydra wants some folder to start from; a training run starts from fairseq's.
    with initialize_config_dir(str(PACKAGE_DIR), version_base="1.1"):
        search_path = GlobalHydra.instance().config_loader().get_search_path().get_path()
    return [(element.provider, element.path) for element in search_path]


def registered_names() -> dict[str, list[str]]:
    """Our tasks, criterions and models in fairseq's registries, after registering them."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from fairseq_lowbit import plugin

        plugin.register()
    # register() has loaded these modules; going through sys.modules keeps fairseq out of cli.
    registries = {
        "tasks": sys.modules["fairseq.tasks"].TASK_REGISTRY,
        "criterions": sys.modules["fairseq.criterions"].CRITERION_REGISTRY,
        "models": sys.modules["fairseq.models"].MODEL_REGISTRY,
    }
    return {
        kind: sorted(name for name, cls in registry.items() if _is_ours(cls))
        for kind, registry in registries.items()
    }


def report(findings: list[Finding]) -> str:
    """The whole report as plain text, which a broken installation can print too."""
    width = max(len(finding.topic) for finding in findings)
    text = []
    for finding in findings:
        for index, line in enumerate(finding.lines):
            text.append(f"{finding.topic if index == 0 else '':{width}}  {line}")
    problems = [problem for finding in findings for problem in finding.problems]
    text.append("")
    for problem in problems:
        text.append(f"{'problem' if problem.needed else 'note'}: {problem.what}")
        text.append(f"   fix: {problem.fix}")
    if not problems:
        text.append("no problems found")
    return "\n".join(text)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The doctor takes none."""


def run(args: argparse.Namespace) -> int:
    """Prints the report; 1 when something is wrong that training needs."""
    findings = [check() for check in CHECKS]
    print(report(findings))
    return int(any(problem.needed for finding in findings for problem in finding.problems))


def _version(distribution: str) -> str | None:
    try:
        return version(distribution)
    except PackageNotFoundError:
        return None


def _is_ours(cls: type) -> bool:
    return cls.__module__.split(".")[0] == "fairseq_lowbit"


def _command_problems(command: str) -> list[Problem]:
    """Another environment's command would train with another fairseq, without our plugin."""
    scripts = Path(sysconfig.get_path("scripts"))
    found = shutil.which(command)
    if found is not None and Path(found).parent.resolve() != scripts.resolve():
        return [
            Problem(
                f"the command {command} is {found}, of another environment than this Python",
                f"activate the environment, or call {scripts / command}",
                needed=False,
            )
        ]
    return []


def _torchaudio_problems() -> list[Problem]:
    """transformers imports a torchaudio that it finds, and fails with it."""
    if find_spec("torchaudio") is None:
        return []
    try:
        import_module("torchaudio")
    except Exception as error:  # OSError where it lacks a library of another torch
        return [
            Problem(
                f"torchaudio does not load, and imports of transformers fail with it: {error}",
                "pip uninstall torchaudio (nothing here needs it, although fairseq-fixed asks for "
                "it), or install the build of torchaudio made for this torch",
                needed=False,
            )
        ]
    return []


def _unseen_plugin_problem() -> Problem:
    return Problem(
        f"Hydra does not see our plugin ({SEARCHPATH_MODULE}): --config-name {PRIMARY_CONFIG} "
        "would not say 'config not found' but start with fairseq's bare defaults and die with "
        "'Must specify batch size either with --max-tokens or --batch-size'",
        "install with pip install -e . (not with editable_mode=compat, not with setup.py develop); "
        f"or, without installing, pass --config-dir {PACKAGE_DIR.parent / 'config'} "
        f"common.user_dir={PACKAGE_DIR}",
    )
