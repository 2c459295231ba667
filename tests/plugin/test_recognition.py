"""Fine-tuning for recognition: asr_ctc on float and quantized encoders."""

import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import sentencepiece
import soundfile
import torch
from omegaconf import OmegaConf
from torch import Tensor

from fairseq_lowbit.cli.main import main
from fairseq_lowbit.data.manifest import write_manifest
from fairseq_lowbit.errors import LowbitError
from fairseq_lowbit.interop import open_model
from fairseq_lowbit.plugin import register
from fairseq_lowbit.runs.folder import UNUSABLE_FILE
from tests.plugin.conftest import SMALL, Run, Trainer, syllables

LETTERS = "abcde "  # of the kinds of syllables
SMALL_SHAPE = [text for text in SMALL if text.startswith("model.")]
# Without dropout and masks, as a few updates should show what is learned.
PLAIN = ("run=demo_asr", "dataset.max_tokens=96000", "task.freeze=none", "optimization.lr=[0.01]")
SCRATCH = (*PLAIN, "model=fastconv_tiny", "quant=float", "task.init_from=null")


def transcribe_syllables(folder: Path, corpus: Path) -> Path:
    """A corpus of eight utterances whose letters are its syllables, for training and validation."""
    shutil.copytree(corpus, folder)
    rng, items, lines = np.random.default_rng(3), [], []
    for index in range(8):
        samples = int(rng.integers(16000, 24000))
        audio, kinds = syllables(rng, samples)
        name = f"audio/said{index}.flac"
        soundfile.write(folder / name, audio, 16000)
        items.append((name, samples))
        lines.append(" ".join("".join(LETTERS[kind] for kind in kinds).split()))
    for split in ("train", "valid"):
        write_manifest(folder / f"{split}.tsv", folder, items)
        (folder / f"{split}.wrd").write_text("\n".join(lines) + "\n")
    return folder


@pytest.fixture(scope="module")
def said(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return transcribe_syllables(tmp_path_factory.mktemp("said") / "data", corpus)


@pytest.fixture
def spoiled(corpus: Path, tmp_path: Path) -> Path:
    """The same corpus, to spoil."""
    return transcribe_syllables(tmp_path / "spoiled", corpus)


def recognize(
    trainer: Trainer, folder: Path, data: Path, *overrides: object, accident: tuple | None = None
) -> Run:
    arguments = trainer.arguments(folder, "asr_ctc", f"task.data={data}", *overrides)
    if "model=fastconv_tiny" not in overrides:
        arguments = [text for text in arguments if text not in SMALL_SHAPE]
    return trainer.fork_arguments(folder, arguments, accident)


@pytest.fixture
def tune(trainer: Trainer, said: Path, tmp_path: Path) -> Callable[..., Run]:
    """``tune(*overrides)``: a run that must succeed, in a folder of its own."""

    def run(*overrides: object) -> Run:
        folder = tmp_path / f"run{len(list(tmp_path.iterdir()))}"
        done = recognize(trainer, folder, said, *PLAIN, *overrides)
        assert done.status == 0, done.output
        return done

    return run


@pytest.fixture(scope="module")
def memorized(
    trainer: Trainer, said: Path, teacher: Path, tmp_path_factory: pytest.TempPathFactory
) -> Run:
    folder = tmp_path_factory.mktemp("memorized") / "run"
    run = recognize(
        trainer,
        folder,
        said,
        *PLAIN,
        f"task.init_from={teacher}",
        "optimization.max_update=200",
        "dataset.validate_interval_updates=100",
        "checkpoint.save_interval_updates=100",
    )
    assert run.status == 0, run.output
    return run


def encoder(path: Path) -> dict[str, Tensor]:
    state = open_model(path).model.state_dict()
    return {name: value for name, value in state.items() if not name.startswith("ctc_proj.")}


def test_eight_utterances_are_learned_by_heart(
    memorized: Run, said: Path, capsys: pytest.CaptureFixture
) -> None:
    last = [record for record in memorized.progress() if record["phase"] == "valid"][-1]
    assert (last["terms"]["wer"], last["terms"]["cer"]) == (0, 0)
    best = memorized.checkpoints / "checkpoint_best.pt"
    assert open_model(best).units == ("", "|", *"abcde")
    assert main(["transcribe", str(best), str(said / "valid.tsv")]) == 0
    texts = [line.partition("\t")[2] for line in capsys.readouterr().out.splitlines()]
    assert texts == (said / "valid.wrd").read_text().splitlines()


def test_fairseq_loads_it_without_any_other_file(memorized: Run) -> None:
    register()
    from fairseq import checkpoint_utils

    (model,), _, task = checkpoint_utils.load_model_ensemble_and_task([str(memorized.last)])
    assert task.units == open_model(memorized.last).units
    assert model.ctc_proj.out_features == len(task.units)


def test_a_frozen_encoder_keeps_every_value(tune: Callable, student_run: Run) -> None:
    run = tune(f"task.init_from={student_run.last}", "task.freeze=encoder")
    assert "calibrating" not in run.output
    before, after = encoder(student_run.last), encoder(run.last)
    assert open_model(run.last).model.plan.precision.name == "bitla_w1a1"
    for name, value in before.items():
        assert torch.equal(after[name], value), name
    losses = run.logged("loss_ctc")
    assert losses[-1] < losses[0]


def test_a_quantized_encoder_goes_on_with_its_scales(tune: Callable, student_run: Run) -> None:
    run = tune(f"task.init_from={student_run.last}")
    assert "calibrating" not in run.output
    before, after = encoder(student_run.last), encoder(run.last)
    scales = [name for name in before if name.endswith("log_scale")]
    assert scales
    moved = [name for name in scales if not torch.equal(after[name], before[name])]
    assert len(moved) > 0.9 * len(scales)


def test_the_front_end_can_be_frozen_alone(tune: Callable, teacher: Path) -> None:
    after = encoder(tune(f"task.init_from={teacher}", "task.freeze=front_end").last)
    before = encoder(teacher)
    changed = {name for name in after if not torch.equal(after[name], before[name])}
    assert not any(name.startswith("feature_extractor.") for name in changed)
    assert {"post_extract_proj.weight", "encoder.layers.0.fc1.weight"} <= changed


def test_the_head_can_be_trained_first(tune: Callable, teacher: Path) -> None:
    run = tune(f"task.init_from={teacher}", "task.freeze_updates=5", "optimization.max_update=7")
    (fifth,) = run.checkpoints.glob("checkpoint_*_5.pt")
    name = "encoder.layers.0.fc1.weight"
    before = encoder(teacher)[name]
    assert torch.equal(encoder(fifth)[name], before)
    assert not torch.equal(encoder(run.last)[name], before)


def test_fine_tuning_goes_on_at_lower_precision(tune: Callable, memorized: Run) -> None:
    """It is calibrated, from the same weights, and the head of the same vocabulary comes along."""
    start = f"task.init_from={memorized.last}"
    run = tune(start, "quant=bitl_w8a8", "optimization.lr=[1e-30]")
    assert "calibrating" in run.output
    before, after = open_model(memorized.last).model, open_model(run.last).model
    assert after.plan.precision.name == "bitl_w8a8"
    for name, value in before.state_dict().items():
        if name != "label_embs_concat":
            assert torch.equal(after.state_dict()[name], value), name
    assert run.logged("loss_ctc")[0] < 0.5


def test_pieces_of_words_are_units_too(
    tune: Callable, said: Path, teacher: Path, tmp_path: Path
) -> None:
    sentencepiece.SentencePieceTrainer.train(
        input=str(said / "train.wrd"),
        model_prefix=str(tmp_path / "spm"),
        vocab_size=20,
        minloglevel=2,
    )
    # As a user names it, from where the command is started.
    run = tune(f"task.init_from={teacher}", "task.units=spm.model")
    (tmp_path / "spm.model").unlink()  # the checkpoint has all that transcribing takes
    units = open_model(run.last).units
    assert len(units) == 18  # a blank in place of what writes nothing
    assert any(unit.startswith("▁") for unit in units)


@pytest.mark.full
def test_killed_and_resumed(trainer: Trainer, said: Path, student_run: Run, tmp_path: Path) -> None:
    options = (
        *PLAIN,
        f"task.init_from={student_run.last}",
        "model.mask_prob=0.3",
        "model.mask_length=3",
        "optimization.max_update=12",
    )
    whole = recognize(trainer, tmp_path / "whole", said, *options)
    folder = tmp_path / "run"
    killed = recognize(trainer, folder, said, *options, accident=("kill_in_update", 8))
    assert killed.status == -signal.SIGKILL, killed.output
    run = recognize(trainer, folder, said, *options)
    assert run.status == 0, run.output
    for name, value in whole.state()["model"].items():
        assert torch.equal(run.state()["model"][name], value), name


def test_two_processes_count_together(
    trainer: Trainer, said: Path, memorized: Run, tmp_path: Path
) -> None:
    """Without learning, they find the errors and the loss that one process found."""
    start = (*SCRATCH, f"task.data={said}", "optimization.lr=[1e-30]", "dataset.max_tokens=48000")
    start = (*start, f"task.init_from={memorized.last}")
    runs = trainer.fork_ranks(tmp_path / "two", "asr_ctc", *start)
    for run in runs:
        assert run.status == 0, run.output
    one, two = (
        [r["terms"] for r in run.progress() if r["phase"] == "valid"][-1]
        for run in (memorized, runs[0])
    )
    assert set(two) == set(one)
    assert (two["wer"], two["cer"]) == (0, 0)
    assert two["loss_ctc"] == pytest.approx(one["loss_ctc"], rel=1e-4)


def test_the_loss_of_a_batch_is_that_of_its_utterances() -> None:
    register()
    from fairseq_lowbit.plugin.ctc import LowbitCtcCriterion

    generator = torch.Generator().manual_seed(0)
    scores = torch.randn(3, 30, 5, generator=generator)
    sizes, targets = [30, 22, 9], [[1, 2, 2, 3], [4], [1, 1]]

    class Model(torch.nn.Module):
        shape = SimpleNamespace(mask_prob=0.0)

        def frame_lengths(self, samples: Tensor) -> Tensor:
            return samples

        def forward(self, waveform: Tensor, *_: object, recognize: bool) -> Tensor:
            return waveform.log_softmax(-1)

    model = Model()
    task = SimpleNamespace(model=model, units=("", "|", "a", "b", "c"))
    criterion = LowbitCtcCriterion(task, SimpleNamespace(squash_weight=1.0))

    def loss(rows: list[int]) -> tuple[Tensor, int]:
        chosen = [torch.tensor(targets[row]) for row in rows]
        longest = max(sizes[row] for row in rows)
        sample = {
            "waveform": scores[rows, :longest],
            "lengths": None,
            "sizes": [sizes[row] for row in rows],
            "units": torch.nn.utils.rnn.pad_sequence(chosen, batch_first=True),
            "unit_sizes": list(map(len, chosen)),
        }
        total, size, _ = criterion(model.train(), sample)
        return total, size

    together, size = loss([0, 1, 2])
    single = [loss([row])[0] for row in range(3)]
    torch.testing.assert_close(together, sum(single))
    assert size == 7
    expected = torch.nn.functional.ctc_loss(
        scores[1, :22].log_softmax(-1), torch.tensor(targets[1]), (22,), (1,), reduction="sum"
    )
    torch.testing.assert_close(single[1], expected)


def test_what_has_more_units_than_frames_is_left_out(
    trainer: Trainer, spoiled: Path, tmp_path: Path
) -> None:
    lines = (spoiled / "train.wrd").read_text().splitlines()
    lines[2] = "ab" * 60
    (spoiled / "train.wrd").write_text("\n".join(lines) + "\n")
    run = recognize(trainer, tmp_path / "run", spoiled, *SCRATCH)
    assert run.status == 0, run.output
    (line,) = (run.checkpoints / UNUSABLE_FILE).read_text().splitlines()
    assert line.startswith("audio/said2.flac\t")
    assert "120 units in" in line


def test_transcripts_that_are_refused(trainer: Trainer, spoiled: Path, tmp_path: Path) -> None:
    words = spoiled / "valid.wrd"
    text = words.read_text()
    words.write_text(text.replace("a", "Q", 1))
    line = next(n for n, row in enumerate(words.read_text().splitlines(), 1) if "Q" in row)
    message = recognize(trainer, tmp_path / "run", spoiled, *SCRATCH).message()
    assert f"{words}:{line}: the character 'Q'" in message
    words.write_text(text + "one more\n")
    assert (
        f"{words} has 9 lines" in recognize(trainer, tmp_path / "run", spoiled, *SCRATCH).message()
    )
    assert not (tmp_path / "run" / "checkpoints" / "checkpoint_last.pt").exists()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"freeze": "all"}, "task.freeze 'all'; allowed are none, front_end, encoder"),
        ({"freeze_updates": -1}, "task.freeze_updates"),
        ({"pad_audio": False}, "task.pad_audio=false"),
    ],
)
def test_settings_of_the_task_that_are_refused(
    settings: dict, message: str, said: Path, tmp_path: Path
) -> None:
    register()
    from fairseq_lowbit.plugin.recognition import LowbitAsrConfig, LowbitAsrTask

    given = {"pad_audio": True, "random_crop": False, **settings}
    config = LowbitAsrConfig(data=str(said), output_dir=str(tmp_path), **given)
    with pytest.raises(LowbitError, match=message):
        LowbitAsrTask(config)


@pytest.mark.parametrize(
    ("rules", "form", "message"),
    [
        ([], "asymmetric", "task.init_from is not set"),
        (["r.yaml"], "asymmetric", "rules beside quant=as_teacher.*drop that"),
        ([], "paper", "form=paper beside quant=as_teacher.*drop that"),
    ],
)
def test_a_precision_as_the_teachers_needs_one(
    rules: list[str], form: str, message: str, tmp_path: Path
) -> None:
    register()
    from fairseq_lowbit.plugin.teacher_shape import adopt_teacher

    precision = {"name": "as_teacher", "form": form, "rule_files": {"rules": rules}}
    config = OmegaConf.create({"task": {"init_from": None}, "model": {"precision": precision}})
    with pytest.raises(LowbitError, match=message):
        adopt_teacher(config, tmp_path)


def test_other_transcripts_in_a_folder_of_a_run(
    trainer: Trainer, memorized: Run, spoiled: Path, teacher: Path, tmp_path: Path
) -> None:
    folder = shutil.copytree(memorized.folder, tmp_path / "run")
    for split in ("train", "valid"):
        words = spoiled / f"{split}.wrd"
        words.write_text(words.read_text().replace("e", "f"))
    options = (*PLAIN, f"task.init_from={teacher}", "optimization.max_update=300")
    assert "another vocabulary" in recognize(trainer, folder, spoiled, *options).message()
