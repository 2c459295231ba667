"""A user's mistakes: one message that names the file or the key, before any time is lost."""

import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch

from fairseq_lowbit.interop import open_model

RATE = 16000


@pytest.fixture
def refuse(trainer, teacher: Path, tmp_path: Path) -> Callable[..., str]:
    """``refuse(*overrides)``: the message of a run that must not start training."""

    def run(*overrides: object, config: str = "bitla_w1a1") -> str:
        given = " ".join(map(str, overrides))
        needed = () if "task.teacher=" in given else (f"task.teacher={teacher}",)
        needed = needed if config != "hubert_fastconv" else ()
        done = trainer.fork(tmp_path / "refused", config, *needed, *overrides)
        assert not done.last.exists()
        assert done.output.count("num_updates=") == 0
        return done.message()

    return run


RULE = "match: '*.fc1'"


@pytest.mark.parametrize(
    "override, named",
    [
        ("model.precision.name=bitla_w1b1", ["bitla_w1b1", "bitla_wNaM"]),
        ("model.precision.name=bitla_w9a1", ["bitla_w9a1", "9 bits", "1 to 8"]),
        ("model.precision.name=bitla_w1", ["bitla_w1", "bitla_w1aM"]),
        ("model.precision.name=sqwq_w2a2", ["sqwq_w2a2", "weight-only"]),
        (f"model.precision.rules=[{{{RULE}, weight_bits: 9}}]", ["*.fc1", "weight_bits", "9"]),
        ("model.precision.rules=[{match: 'encoder.layer.*'}]", ["encoder.layer.*", "fc1"]),
        (f"model.precision.rules=[{{{RULE}, method: none, weight_bits: 2}}]", ["*.fc1", "none"]),
        (f"model.precision.rules=[{{{RULE}, method: lsq}}]", ["lsq", "elastic"]),
        (
            f"model.precision.rules=[{{{RULE}, bits: 2}}]",
            ["model.precision.rules.bits", "weight_bits"],
        ),
        ("model.precision.rules=[{weight_bits: 2}]", ["match"]),
        ("+model.precision.lenght_scaled=false", ["lenght_scaled"]),
        ("+model.encoder_layer=2", ["encoder_layer"]),
        ("+task.teachers=a.pt", ["teachers"]),
        ("model.encoder_layers=two", ["encoder_layers", "two"]),
        ("model.conv_pos_groups=5", ["encoder_embed_dim 32", "conv_pos_groups 5"]),
        ("model.conv_feature_layers='[(8,10)]'", ["conv_feature_layers", "(8,10)"]),
        ("model.padding=none", ["model.padding", "none", "fairseq"]),
        ("criterion.attention=maps", ["criterion.attention", "maps", "scores"]),
        ("task.data=null", ["task.data"]),
        ("task.data=/no/such/folder", ["task.data", "/no/such/folder"]),
        ("task.teacher=null", ["task.teacher"]),
        ("task.teacher=/no/such/teacher.pt", ["/no/such/teacher.pt"]),
        ("task.init_from=/no/such/start.pt", ["/no/such/start.pt"]),
        (
            "task.calibration.max_seconds=0.01",
            ["calibration.max_seconds 0.01", "from 0.025 up"],
        ),
        ("optimizer.squashed_lr_ratio=-1", ["optimizer.squashed_lr_ratio -1", "from 0 up"]),
        ("criterion.layer_weight=nan", ["criterion.layer_weight nan: give a number from 0 up"]),
        ("common.amp=true", ["common.amp=true", "common.bf16=true"]),
        ("task.min_sample_size=-1", ["task.min_sample_size -1", "from 0 up"]),
        ("task.max_sample_size=10", ["task.max_sample_size 10", "at least", "400 samples"]),
        ("task.max_sample_size=0", ["task.max_sample_size 0", "null for no limit"]),
        ("task.max_keep_size=3999", ["task.max_keep_size 3999", "task.min_sample_size 4000"]),
        ("task.min_sample_size=1000000", [".tsv", "files", "1000000", "task.min_sample_size"]),
    ],
)
def test_settings(override: str, named: list[str], refuse: Callable) -> None:
    message = refuse(override)
    for part in named:
        assert part in message


def test_the_real_command_says_it_as_briefly(trainer, teacher: Path, tmp_path: Path) -> None:
    run = trainer.run(tmp_path / "run", "bitla_w1a1", "task.teacher=/no/such/teacher.pt")
    assert run.message() == "checkpoint /no/such/teacher.pt does not exist"


@pytest.mark.parametrize(
    "missing, config", [("data", "hubert_fastconv"), ("teacher", "bitla_w1a1")]
)
def test_what_has_to_be_given(missing: str, config: str, trainer, tmp_path: Path) -> None:
    command = trainer.command(tmp_path / "run", config)
    arguments = [a for a in command[1:] if not a.startswith(f"task.{missing}=")]
    message = trainer.fork_arguments(tmp_path / "run", arguments).message()
    assert f"task.{missing}" in message


def test_teacher_of_another_shape(refuse: Callable, teacher: Path) -> None:
    message = refuse("model.encoder_ffn_embed_dim=48")
    assert str(teacher) in message
    assert "encoder.layers.0.fc1.weight is (64, 32) where (48, 32) is wanted" in message
    assert "encoder.layers.1.fc1.weight" not in message
    assert "(and 3 more)" in message


def test_teacher_with_more_layers(refuse: Callable) -> None:
    assert "encoder.layers.1.self_attn" in refuse("model.encoder_layers=1")


def test_damaged_teachers(refuse: Callable, teacher: Path, tmp_path: Path) -> None:
    path = tmp_path / "damaged.pt"
    whole = teacher.read_bytes()
    for content in (whole[: len(whole) // 2], b"", b"RIFF" + bytes(1000), b"text\n" * 100):
        path.write_bytes(content)
        assert str(path) in refuse(f"task.teacher={path}")


def test_files_that_are_no_teachers(refuse: Callable, tmp_path: Path) -> None:
    path = tmp_path / "other.pt"
    torch.save({"state_dict": {"weight": torch.zeros(3)}}, path)
    message = refuse(f"task.teacher={path}")
    assert str(path) in message
    assert "not a fairseq checkpoint" in message
    torch.save({"model": torch.nn.Linear(2, 2)}, path)
    assert str(path) in refuse(f"task.teacher={path}")
    assert str(tmp_path) in refuse(f"task.teacher={tmp_path}")


def test_collapsed_teacher(refuse: Callable, teacher: Path, tmp_path: Path) -> None:
    """A teacher whose layers say the same at all times has nothing to teach."""
    state = torch.load(teacher, weights_only=False)
    for name, value in state["model"].items():
        if name.startswith("encoder.layers.1.") and "norm" in name:
            value.zero_()
    state["model"]["encoder.layers.1.final_layer_norm.bias"].uniform_()
    path = tmp_path / "collapsed.pt"
    torch.save(state, path)
    message = refuse(f"task.teacher={path}")
    assert str(path) in message
    assert "collapsed" in message
    assert "[2]" in message


# Data


def edit(path: Path, change: Callable[[str], str]) -> None:
    path.write_text(change(path.read_text()))


def test_manifests(refuse: Callable, broken: Path) -> None:
    train, original = broken / "train.tsv", (broken / "train.tsv").read_text()
    damages = {
        "empty": "",
        "is empty": f"{broken}\n",
        "does not exist": original.replace(f"{broken}\n", "/moved/away\n"),
        "train.tsv:3": original.replace("\t", " ").replace(" ", "\t", 1),
        "files in a row are unusable": original.replace("audio/", "audios/"),
    }
    for words, content in damages.items():
        train.write_text(content)
        message = refuse(f"task.data={broken}")
        assert str(train) in message
        assert words in message
    train.unlink()
    assert str(train) in refuse(f"task.data={broken}")
    train.write_text(original)
    (broken / "valid.tsv").unlink()
    assert str(broken / "valid.tsv") in refuse(f"task.data={broken}")


def test_audio_of_another_kind(refuse: Callable, broken: Path) -> None:
    audio, _ = soundfile.read(broken / "audio" / "train03.flac", dtype="float32")
    soundfile.write(broken / "audio" / "train03.flac", audio[::2], 8000)
    message = refuse(f"task.data={broken}")
    for part in ("train03.flac", "8000 Hz", "16000 Hz", "fairseq-lowbit prepare"):
        assert part in message
    soundfile.write(broken / "audio" / "train03.flac", np.stack([audio, audio], 1), RATE)
    message = refuse(f"task.data={broken}")
    assert "train03.flac" in message
    assert "2 channel" in message


def test_mostly_unreadable(refuse: Callable, broken: Path) -> None:
    for path in sorted((broken / "audio").glob("train*"))[2:]:
        path.write_bytes(b"not audio")
    message = refuse(f"task.data={broken}")
    assert re.search(r"\d+ of 16 training files are unusable, listed in", message)


def cut_short(path: Path) -> None:
    """A header that promises more than is there: only decoding finds out."""
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 3])


def silence(path: Path) -> None:
    audio, rate = soundfile.read(path)
    soundfile.write(path, 0 * audio, rate)


@pytest.mark.parametrize("damage", [cut_short, silence])
def test_one_bad_file_is_skipped_and_named(
    damage: Callable[[Path], None], train: Callable, broken: Path, teacher: Path
) -> None:
    damage(broken / "audio" / "train05.flac")
    run = train("bitla_w1a1", f"task.data={broken}", f"task.teacher={teacher}")
    assert len(run.logged("loss")) == 5
    lines = (run.checkpoints / "skipped_files.tsv").read_text().splitlines()
    assert [line.split("\t")[0] for line in lines] == ["audio/train05.flac"]
    warnings = [line for line in run.output.splitlines() if "[WARNING]" in line]
    assert sum("train05.flac" in line for line in warnings) == 1
    assert "1 unusable files were skipped" in run.output


def test_too_many_bad_files(trainer, broken: Path, teacher: Path, tmp_path: Path) -> None:
    for name in ("train02", "train05", "train11"):
        silence(broken / "audio" / f"{name}.flac")
    options = (f"task.data={broken}", f"task.teacher={teacher}")
    run = trainer.fork(tmp_path / "run", "bitla_w1a1", *options)
    message = run.message()
    assert "of 16 training files" in message
    assert str(run.checkpoints / "skipped_files.tsv") in message
    assert "task.max_unusable" in message


def test_labels(refuse: Callable, broken: Path) -> None:
    def refused(*overrides: str) -> str:
        return refuse(f"task.data={broken}", *overrides, config="hubert_fastconv")

    labels, original = broken / "train.km", (broken / "train.km").read_text()
    labels.write_text("".join(original.splitlines(keepends=True)[:-3]))
    message = refused()
    for part in (str(labels), "13 lines", str(broken / "train.tsv"), "16 files"):
        assert part in message
    labels.write_text("")
    assert str(labels) in refused()
    labels.unlink()
    message = refused()
    assert str(labels) in message
    assert "fairseq-lowbit labels" in message
    labels.write_text(original.replace("3", "33"))
    message = refused()
    assert re.search(r"train\.km line \d+: label '33'", message)
    labels.write_text(original)
    dictionary = broken / "dict.km.txt"
    dictionary.write_text("")
    message = refused()
    assert str(dictionary) in message
    assert "empty" in message
    dictionary.unlink()
    assert str(dictionary) in refused()
    assert "labels" in refused("task.labels=[km, phn]")


def test_a_loss_that_is_not_finite(train: Callable, trainer, teacher: Path) -> None:
    options = ("bitla_w1a1", f"task.teacher={teacher}")
    run = train(*options)
    before = run.state()["model"]
    diverged = ("optimization.max_update=15", "optimization.lr=[1e30]")
    message = trainer.fork(run.folder, *options, *diverged).message()
    assert re.search(r"not finite at update \d+", message)
    for part in ("loss_final", "loss_layers", "loss_attention", ".flac", "optimization.lr"):
        assert part in message
    assert open_model(run.last).updates == 5
    assert all(torch.equal(run.state()["model"][name], value) for name, value in before.items())
    resumed = trainer.fork(run.folder, *options, "optimization.max_update=10")
    assert resumed.status == 0
    assert open_model(run.last).updates == 10
