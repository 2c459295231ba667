"""README.md and docs/*.md: what they show is what the commands print, and their Python runs."""

import re
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fairseq_lowbit.interop import open_model
from fairseq_lowbit.interop.exporting import FORMATS

ROOT = Path(__file__).resolve().parents[1]
SCRIPT = ROOT / "scripts" / "docs.py"
DOCS = runpy.run_path(str(SCRIPT))
README = ROOT / "README.md"
PAGES = [README, *sorted((ROOT / "docs").glob("*.md"))]
CHECKPOINT = ROOT / "tests/compatibility/v0_1/half_done/checkpoints/checkpoint_last.pt"


def page_id(path: Path) -> str:
    return path.name


def test_no_block_is_stale() -> None:
    result = subprocess.run(
        [sys.executable, SCRIPT, "--check"], capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stdout + result.stderr


def test_a_stale_block_is_renewed_and_the_rest_is_kept() -> None:
    page = "# Head\n<!-- command: date -->\nold\n<!-- end -->\ntext\n"
    fresh = DOCS["with_fresh_blocks"](page, {"date": "today"}.__getitem__)
    expected = "# Head\n<!-- command: date -->\n\n```text\ntoday\n```\n\n<!-- end -->\ntext\n"
    assert fresh == expected
    assert DOCS["with_fresh_blocks"](fresh, {"date": "today"}.__getitem__) == fresh


def test_a_block_without_an_end_is_an_error() -> None:
    with pytest.raises(SystemExit, match="has no <!-- end -->"):
        DOCS["with_fresh_blocks"]("# Head\n<!-- command: date -->\nold\n", str)


def test_a_command_that_fails_is_an_error() -> None:
    with pytest.raises(SystemExit, match="invalid choice: .no_such_command"):
        DOCS["printed"]("fairseq-lowbit no_such_command")


def test_tables_become_markdown() -> None:
    drawn = """two models
┏━━━━━━━┳━━━━━━━━━┓
┃       ┃ storage ┃
┃ model ┃      MB ┃
┡━━━━━━━╇━━━━━━━━━┩
│ a     │   12.50 │
├───────┼─────────┤
│ b     │    1.25 │
└───────┴─────────┘
MB: a million bytes
"""
    assert DOCS["as_markdown"](drawn) == (
        "Two models:\n\n| model | storage MB |\n| --- | --: |\n| a | 12.50 |\n| b | 1.25 |\n\n"
        "- MB: a million bytes\n"
    )


def test_the_first_page_is_short() -> None:
    text = README.read_text(encoding="utf-8")
    assert len(text.encode()) <= 10 * 1024
    assert [line for line in text.splitlines() if len(line) > 100] == []


@pytest.mark.parametrize("page", PAGES, ids=page_id)
def test_links_lead_somewhere(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    for target in re.findall(r'\]\(([^)\s]+)\)|src="([^"]+)"', text):
        link = "".join(target)
        if link.startswith("https://"):
            continue
        path, _, anchor = link.partition("#")
        linked = page.parent / path if path else page
        assert linked.exists(), link
        if anchor:
            heads = re.findall(r"^#+ (.+)$", linked.read_text(encoding="utf-8"), re.MULTILINE)
            assert anchor in [head.lower().replace(" ", "-") for head in heads], link


def test_the_first_page_repeats_the_measured_demo() -> None:
    """Its table has the last layer's figures of the table in docs/results.md."""
    measured = (ROOT / "docs/results.md").read_text(encoding="utf-8").split("## The grid")[0]
    rows = {
        "teacher, float": "FP teacher",
        "PTQ, BiT-LA W1A1": "PTQ bitla_w1a1",
        "student, BiT-LA W2A2": "QAT bitla_w2a2",
        "student, BiT-LA W1A1": "QAT bitla_w1a1",
    }
    for short, full in rows.items():
        stored, masked, cosine, snr, probe = cells_of(README.read_text(encoding="utf-8"), short)
        expected = [cell.split()[-1] for cell in cells_of(measured, full)][:5]
        assert [stored, masked, cosine, snr.split()[0], probe.split()[0]] == expected


def cells_of(text: str, row: str) -> list[str]:
    """The cells behind the name of the first row called so."""
    (line, *_) = (line for line in text.splitlines() if line.startswith(f"| {row} |"))
    return [cell.strip() for cell in line.split("|")[2:-1]]


def python_blocks() -> list:
    return [
        pytest.param(block, id=f"{page.name}-{index}")
        for page in PAGES
        for index, block in enumerate(
            re.findall(r"^```python\n(.*?)^```$", page.read_text("utf-8"), re.MULTILINE | re.DOTALL)
        )
    ]


@pytest.mark.parametrize("block", python_blocks())
def test_python_runs(block: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As it is written, with a tiny random HuBERT, a tiny checkpoint and a second of noise."""
    if "transformers" in block:
        replace_pretrained(monkeypatch)
    for optional in ("onnxruntime", "s3prl"):
        if optional in block:
            pytest.importorskip(optional)
    monkeypatch.chdir(tmp_path)
    trained = tmp_path / "exp/bitla_w1a1/checkpoints/checkpoint_best.pt"
    trained.parent.mkdir(parents=True)
    shutil.copy(CHECKPOINT, trained)
    FORMATS["safetensors"].export(open_model(trained), tmp_path / "student.safetensors")
    torch.manual_seed(0)
    waveforms = [torch.randn(2, 16000) for _ in range(2)]
    exec(block, {"waveforms": waveforms, "waveform": waveforms[0]})


def replace_pretrained(monkeypatch: pytest.MonkeyPatch) -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.HubertConfig(
        conv_dim=(8, 8, 8),
        conv_kernel=(10, 8, 4),
        conv_stride=(5, 8, 4),
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        num_conv_pos_embeddings=8,
        num_conv_pos_embedding_groups=2,
    )
    tiny = transformers.HubertModel(config).eval()
    monkeypatch.setattr(transformers.HubertModel, "from_pretrained", lambda _: tiny)
