"""Writes the checkpoints and the half-done run of ``tests/compatibility/<version>``.

    python tests/compatibility/make_fixture.py FOLDER

It was run by the commit before a change of what is stored, with the runs that the change is about.
The tests of later versions load, measure and resume what it has written.
"""

import json
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from fairseq_lowbit.interop import open_model
from fairseq_lowbit.nn.operators import Operator
from tests.plugin.conftest import TEACHER, Trainer, make_corpus, user_environment

OVERLAPPING = (
    "model.precision.rules=[{match: 'encoder.layers.*', granularity: per_channel},"
    "{match: encoder.layers.0.fc1, weight_bits: 4}]"
)
FRONT_END = (
    "model.precision.rules=[{match: 'feature_extractor.*', weight_bits: 8, activation_bits: 3}]"
)
# By folder: name, configuration and overrides of runs of three updates; what is calibrated only.
RUNS = {
    "v0_1": {
        "front_end": ("bitla_w1a1", "rules=front_end_w8a8"),
        "stretched": ("bitl_w2a2", "rules=stretched"),
        "overlapping_rules": ("bitl_w2a2", OVERLAPPING),
        "squashed_configuration": ("sqwq_w8",),
        "squashed_by_name": ("sqwq_w2", "model.precision.name=sqwq_w8"),
        "hubert": ("bitla_w4a4", "loss=hubert"),
    },
    # Inputs behind a GELU, of few bits and of many.
    "v0_4": {
        "front_end": ("bitla_w1a1", FRONT_END),
        "many_bits": ("bitl_w8a8",),
    },
}
CALIBRATED = {"v0_1": "minmax_w4a4", "v0_4": "bitla_w4a4"}
TINIER = (
    "model.conv_feature_layers='[(4,10,5)]+[(4,3,2)]*4+[(8,2,2)]*2'",
    "model.encoder_embed_dim=16",
    "model.encoder_ffn_embed_dim=32",
    "model.final_dim=8",
    "checkpoint.save_interval_updates=3",
    "dataset.validate_interval_updates=3",
)
LONGER = (
    "optimization.max_update=60",
    "checkpoint.save_interval_updates=60",
    "dataset.validate_interval_updates=60",
)
HALF_DONE = ("bitla_w2a2", "optimization.max_update=12", "optimization.lr=[0.005]")


def main(folder: Path) -> None:
    work = Path(tempfile.mkdtemp())
    trainer = Trainer(make_corpus(work / "data"))

    def run(name: str, config: str, *overrides: str) -> Path:
        target = work / name
        command = [*trainer.command(target, config, *TINIER, *overrides)]
        # SMALL comes behind what a test gives; the smaller values have to come last.
        subprocess.run(
            [*command, *TINIER, *overrides], check=True, env=user_environment(), cwd=work
        )
        return target / "checkpoints" / "checkpoint_last.pt"

    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    teacher = folder / "teacher.pt"
    shutil.copy(
        run(
            "teacher",
            "hubert_fastconv",
            *TEACHER,
            "optimization.max_update=60",
            "checkpoint.save_interval_updates=60",
            "dataset.validate_interval_updates=60",
        ),
        teacher,
    )
    strip(teacher)
    for name, (config, *overrides) in RUNS[folder.name].items():
        last = run(name, config, f"task.teacher={teacher}", "optimization.max_update=3", *overrides)
        shutil.copy(last, folder / f"{name}.pt")
        strip(folder / f"{name}.pt")
    command = [str(Path(sys.executable).with_name("fairseq-lowbit")), "ptq", str(teacher)]
    command += ["--data", str(trainer.data), "--precision", CALIBRATED[folder.name]]
    subprocess.run([*command, "--out", str(folder / "calibrated.pt")], check=True)
    write_expected(folder)
    half_done(folder, run, work, teacher)
    anonymize(folder)


def strip(path: Path) -> None:
    """Without the optimizer's state, which only a resumed run needs."""
    state = torch.load(path, weights_only=False)
    state.pop("last_optimizer_state", None)
    torch.save(state, path)


def anonymize(folder: Path) -> None:
    """Replaces the folders of the machine in checkpoints and records."""
    for path in folder.rglob("*.pt"):
        torch.save(anonymous(torch.load(path, weights_only=False)), path)
    for path in folder.rglob("*.yaml"):
        path.write_text(re.sub(r"(?<=[\s=])/[^\s,']*/", "/before/", path.read_text()))


def anonymous(value: Any) -> Any:
    """In nested dictionaries and lists."""
    if isinstance(value, dict):
        return {key: anonymous(entry) for key, entry in value.items()}
    if isinstance(value, list):
        return [anonymous(entry) for entry in value]
    return re.sub(r"^/.*/(?=[^/]+$)", "/before/", value) if isinstance(value, str) else value


def write_expected(folder: Path) -> None:
    waveform = torch.randn(1, 8000, generator=torch.Generator().manual_seed(0))
    expected, plans = {"waveform": waveform}, {}
    for path in sorted(folder.glob("*.pt")):
        loaded = open_model(path)
        model = loaded.model
        with torch.inference_mode():
            expected[f"{path.stem}.output"] = model.hidden_states(waveform)[0][-1].contiguous()
        for name, module in model.named_modules():
            if isinstance(module, Operator) and module.weight_quantizer is not None:
                codes = module.weight_quantizer.codes(module.stored_weight()).integers
                expected[f"{path.stem}.codes.{name}"] = codes.to(torch.int16).flatten()[:64].clone()
        plans[path.stem] = {
            "bytes": model.plan.bytes,
            "is_calibrated_only": loaded.is_calibrated_only,
            "entries": [
                [e.module, e.method, e.weight_bits, e.activation_bits, e.granularity, e.group_size]
                for e in model.plan.entries
            ],
        }
    save_file(expected, folder / "expected.safetensors")
    (folder / "plans.json").write_text(json.dumps(plans, indent=0))


def half_done(folder: Path, run, work: Path, teacher: Path) -> None:
    """A run of 12 updates that stopped after 6, and where it ended when it went on."""
    config, *overrides = HALF_DONE
    given = (f"task.teacher={teacher}", *overrides)
    last = run("half_done", config, *given, "optimization.max_update=6")
    source = work / "half_done"
    target = folder / "half_done"
    for name in (
        "checkpoints/checkpoint_last.pt",
        "checkpoints/precision_plan.json",
        "checkpoints/health.jsonl",
        ".hydra/config.yaml",
        ".hydra/hydra.yaml",
        ".hydra/overrides.yaml",
    ):
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(source / name, target / name)
    run("half_done", config, *given, "optimization.max_update=12")
    ended = torch.load(last, weights_only=False)["model"]
    save_file({k: v.contiguous() for k, v in ended.items()}, folder / "half_done_ended.safetensors")


if __name__ == "__main__":
    main(Path(sys.argv[1]).absolute())
