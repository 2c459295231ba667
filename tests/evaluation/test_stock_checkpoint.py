"""A HuBERT that fairseq's own task has trained, read where fairseq was never imported."""

import subprocess
import sys
from dataclasses import asdict, fields
from pathlib import Path

import pytest
import torch
from fairseq.data import Dictionary
from fairseq.models.hubert.hubert import HubertConfig, HubertModel
from fairseq.tasks.hubert_pretraining import HubertPretrainingConfig
from omegaconf import OmegaConf

from fairseq_lowbit.interop import open_model
from fairseq_lowbit.plugin import register
from tests.evaluation.conftest import SHAPE

COMMANDS = """
import sys
from pathlib import Path
from fairseq_lowbit.cli.main import main

stock, data, work = sys.argv[1:]
student = f"{work}/ptq.pt"
for command in (
    ["ptq", stock, "--data", data, "--precision", "bitl_w8a8", "--out", student],
    ["profile", stock],
    ["evaluate", stock, "--data", data, "--out", f"{work}/table", "--student", f"PTQ={student}"],
):
    assert main(command) == 0, command
assert "fairseq" not in sys.modules
"""


@pytest.fixture
def stock(tmp_path: Path) -> Path:
    labels = Dictionary()
    for label in range(3):
        labels.add_symbol(str(label))
    known = {field.name for field in fields(HubertConfig)}
    shape = {key: value for key, value in asdict(SHAPE).items() if key in known}
    model = HubertConfig(_name="hubert", label_rate=50, **shape)
    task = HubertPretrainingConfig(_name="hubert_pretraining", sample_rate=16_000)
    config = OmegaConf.create({"model": model, "task": task})
    state = {
        "args": None,
        "cfg": OmegaConf.to_container(config, enum_to_str=True),
        "model": HubertModel(model, task, [labels]).state_dict(),
        "optimizer_history": [{"optimizer_name": "FairseqAdam", "num_updates": 20}],
        "task_state": {"dictionaries": [labels]},
    }
    torch.save(state, tmp_path / "stock.pt")
    return tmp_path / "stock.pt"


def test_commands_read_it_without_fairseq(stock: Path, data: Path, tmp_path: Path) -> None:
    arguments = [str(stock), str(data), str(tmp_path)]
    done = subprocess.run(
        [sys.executable, "-c", COMMANDS, *arguments], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert (tmp_path / "table" / "comparison.json").is_file()


def test_fairseq_still_reads_what_it_could_before(stock: Path) -> None:
    register()
    allowed = set(torch.serialization.get_safe_globals())
    assert open_model(stock).updates == 20
    assert set(torch.serialization.get_safe_globals()) == allowed
    state = torch.load(stock, weights_only=True)
    assert isinstance(state["task_state"]["dictionaries"][0], Dictionary)
