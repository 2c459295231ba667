"""``fairseq-lowbit sweep-table``: what it shows, what it keeps, and runs that are not well."""

import csv
import json
import os
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from fairseq_lowbit.cli.main import main
from fairseq_lowbit.errors import LowbitError
from fairseq_lowbit.evaluation.compare import compare
from fairseq_lowbit.evaluation.quality import Candidate, Reference, read_held_out
from fairseq_lowbit.models import Hubert, LoadedModel
from fairseq_lowbit.precision import Precision
from fairseq_lowbit.profiling.paper import paper_wer
from fairseq_lowbit.runs import run_quality
from fairseq_lowbit.runs.collection import Entry, model_records
from fairseq_lowbit.runs.run import Run
from fairseq_lowbit.runs.tables import read_csv
from tests.evaluation.conftest import SHAPE, calibrated


class Shown:
    """What one call of the command printed and wrote."""

    def __init__(self, status: int, printed: str, errors: str, folder: Path) -> None:
        self.status, self.printed, self.errors = status, printed, errors
        if (folder / "t.csv").is_file():
            with open(folder / "t.csv") as file:
                self.rows = {row["name"]: row for row in csv.DictReader(file)}
            self.markdown = (folder / "t.md").read_text()

    @property
    def names(self) -> list[str]:
        return list(self.rows)


@pytest.fixture
def table(tmp_path: Path, capsys: pytest.CaptureFixture) -> Callable[..., Shown]:
    """``table(*arguments)``, with both files written into a folder of its own."""

    def run(*arguments: object) -> Shown:
        out = tmp_path / "out"
        files = (f"--csv={out}/t.csv", f"--markdown={out}/t.md")
        status = main(["sweep-table", *map(str, arguments), *files])
        captured = capsys.readouterr()
        return Shown(status, captured.out, captured.err, out)

    return run


def forbid_measuring(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object) -> None:
        raise AssertionError("measured again")

    monkeypatch.setattr(run_quality, "open_model", refuse)


def test_runs_beside_their_teacher(
    table: Callable,
    make_run: Callable,
    teacher: LoadedModel,
    data: Path,
    tmp_path: Path,
) -> None:
    models = {name: calibrated(name) for name in ("bitla_w2a2", "bitla_w1a1")}
    common = ["run=demo", f"task.data={data}"]
    for name, model in models.items():
        make_run(f"exp/{name}", model, overrides=[*common, f"quant={name}", "common.seed=1"])
    shown = table(tmp_path / "exp", "--paper")
    assert shown.status == 0
    # By storage; the teacher, whatever its size, before its students.
    assert shown.names == [f"teacher {tmp_path.name}/teacher.pt", "bitla_w1a1", "bitla_w2a2"]
    assert not shown.rows["bitla_w1a1"]["overrides"].startswith("run=")
    assert shown.rows["bitla_w1a1"]["overrides"] == "quant=bitla_w1a1"

    candidates = [Candidate(name, model) for name, model in models.items()]
    expected = compare(teacher, candidates, read_held_out(data, teacher), lambda name: None)
    for row in expected.rows:
        found = shown.rows[shown.names[0] if row.agreement is None else row.name]
        assert float(found["storage_mb"]) == pytest.approx(row.storage_mb)
        assert float(found["masked_accuracy"]) == row.masked.accuracy
        rate = row.probes["keyword_error"].rate
        assert float(found["keyword_error"]) == rate.value
        assert float(found["keyword_error_margin"]) == (rate.high - rate.low) / 2
        if row.agreement is not None:
            assert float(found["cosine"]) == row.agreement.cosine[-1]
            layers = [float(value) for value in found["snr_db_layers"].split()]
            assert layers == pytest.approx(row.agreement.snr_db, rel=1e-4)
            assert f"{row.agreement.cosine[-1]:.3f}" in shown.printed
    assert re.search(r"│ bitla_w2a2 +│ bitla_w2a2 +│ +10/10 │ +0.5000 │", shown.printed)
    assert "│ 12.68 │ finished │" in shown.printed
    assert "measuring 2 of 2: " in shown.errors
    assert f"| bitla_w1a1 | bitla_w1a1 | 10/10 | 0.5000 | {expected.rows[2].storage_mb:.2f} |" in (
        shown.markdown
    )


def test_what_a_group_has_in_common_is_not_repeated(
    table: Callable, make_run: Callable, data: Path, tmp_path: Path
) -> None:
    common = ["run=demo", "optimization.lr=[0.001]"]
    for seed in (1, 2):
        make_run(f"exp/{seed}", None, overrides=[*common, f"common.seed={seed}"])
    make_run("exp/other", None, overrides=["common.seed=1"], teacher=str(tmp_path / "other.pt"))
    rows = table(tmp_path / "exp", "--no-evaluate").rows
    # A run of another teacher stands in another group, and alone there it says all.
    told = {name: rows[name]["overrides"] for name in ("1", "2", "other")}
    assert told == {name: f"common.seed={seed}" for name, seed in zip(told, "121", strict=True)}


def test_a_run_is_measured_once(
    table: Callable,
    make_run: Callable,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    folder = make_run("exp/a", calibrated("bitla_w1a1"))
    unknown = table(tmp_path / "exp", "--no-evaluate")
    assert "measuring" not in unknown.errors
    assert unknown.rows["a"]["cosine"] == ""
    assert unknown.rows["a"]["best_loss"] == "0.5"
    first = table(tmp_path / "exp")
    # A copy elsewhere is the same run, its checkpoint untouched.
    folder.rename(tmp_path / "moved")
    with monkeypatch.context() as context:
        forbid_measuring(context)
        again = table(tmp_path / "moved")
        known = table(tmp_path / "moved", "--no-evaluate")
        assert (
            table(tmp_path / "moved", "--no-evaluate", "--seconds=5").rows["moved"]["snr_db"] == ""
        )
    for shown in (again, known):
        assert shown.rows[shown.names[0]] == first.rows[first.names[0]]
        ignored = {"name", "folder"}
        assert {k: v for k, v in shown.rows["moved"].items() if k not in ignored} == {
            k: v for k, v in first.rows["a"].items() if k not in ignored
        }
    os.utime(tmp_path / "moved" / "checkpoints" / "checkpoint_last.pt")
    assert "measuring 1 of 1" in table(tmp_path / "moved").errors
    (tmp_path / "moved" / "evaluation.json").write_text("{")
    assert "measuring 1 of 1" in table(tmp_path / "moved").errors


def test_runs_that_are_not_well(
    table: Callable, make_run: Callable, model: Hubert, tmp_path: Path
) -> None:
    good = calibrated("bitla_w2a2")
    make_run("exp/good", good)
    make_run("exp/growing", good, updates=3)
    make_run("exp/new", None)
    (make_run("exp/failed", None) / "failure.txt").write_text("the loss is not finite\n")
    broken = make_run("exp/broken", good) / "checkpoints" / "checkpoint_last.pt"
    broken.write_bytes(broken.read_bytes()[:5000])
    make_run("exp/shallow", Hubert(replace(model.shape, encoder_layers=1)))
    make_run("exp/orphan", good, teacher=str(tmp_path / "gone.pt"))
    make_run("exp/deaf", good, data=str(tmp_path / "nothing"))
    make_run("exp/dumb", good, data=None)
    (make_run("exp/foreign", None) / ".hydra" / "config.yaml").write_text("a: 1\n")
    shown = table(tmp_path / "exp", tmp_path / "empty")
    assert shown.status == 1
    status = {name: (row["status"], row["message"]) for name, row in shown.rows.items()}
    assert status["good"] == ("finished", "")
    assert status["growing"] == ("unfinished", "")
    assert status["new"] == ("no checkpoint", "")
    assert status["failed"] == ("failed", "the loss is not finite")
    expected = {
        "broken": ("failed", f"{broken} is truncated"),
        "shallow": ("finished", "1 layers"),
        "orphan": ("finished", f"{tmp_path}/gone.pt does not exist"),
        "deaf": ("finished", f"no manifest {tmp_path}/nothing/test.tsv"),
        "dumb": ("finished", "--data"),
        "foreign": ("unreadable", "config.yaml is not the configuration"),
        str(tmp_path / "empty"): ("unreadable", "no such file or folder"),
    }
    for name, (state, message) in expected.items():
        assert status[name][0] == state
        assert message in status[name][1]
        assert status[name][1] in shown.markdown
    for name in ("good", "growing"):
        assert -1 < float(shown.rows[name]["cosine"]) < 1
    printed = re.sub(r"[\s│]+", " ", shown.printed)
    assert "failed the loss is not finite" in printed
    assert "│     3/10 │" in re.sub(r" +3/10", "     3/10", shown.printed)


def test_teachers_and_data_of_the_command_line(
    table: Callable, make_run: Callable, data: Path, tmp_path: Path
) -> None:
    """Without them, runs of different teachers are apart and each knows its own."""
    first = make_run("exp/stage1", calibrated("bitla_w2a2"))
    checkpoint = first / "checkpoints" / "checkpoint_last.pt"
    make_run("exp/stage2", calibrated("bitla_w1a1"), teacher=str(checkpoint), data="/gone")
    teacher = f"teacher {tmp_path.name}/teacher.pt"
    shown = table(tmp_path / "exp", f"--data={data}")
    assert shown.status == 0
    assert shown.names == ["teacher exp/stage1", "stage2", teacher, "stage1"]
    assert shown.rows["teacher exp/stage1"]["precision"] == "bitla_w2a2"
    assert shown.rows["stage1"]["teacher"] == str(tmp_path / "teacher.pt")
    one = table(tmp_path / "exp", f"--data={data}", f"--teacher={tmp_path / 'teacher.pt'}")
    assert one.names == [teacher, "stage2", "stage1"]
    assert one.rows["stage2"]["cosine"] != shown.rows["stage2"]["cosine"]


def test_a_run_without_a_teacher(
    table: Callable, make_run: Callable, model: Hubert, tmp_path: Path
) -> None:
    make_run("exp/teacher", model, teacher=None, loss="lowbit_hubert")
    shown = table(tmp_path / "exp", "--paper")
    assert shown.names == ["teacher"]
    assert shown.rows["teacher"]["cosine"] == ""
    assert 0 < float(shown.rows["teacher"]["masked_accuracy"]) < 1
    assert shown.rows["teacher"]["paper_wer"] == "7.06"


def test_stages_and_runs_that_save_nothing(
    table: Callable, make_run: Callable, tmp_path: Path
) -> None:
    stages = [{"precision": "w2a2"}, {"precision": "w1a1", "updates": 10}]
    last = make_run("exp/in_stages", calibrated("bitla_w1a1"), stages=stages)
    stage = "checkpoints/stage1_bitla_w2a2"
    make_run(f"exp/in_stages/{stage}", calibrated("bitla_w2a2"), planned=20, is_stage=True)
    config = make_run("exp/trial", None) / ".hydra" / "config.yaml"
    config.write_text(config.read_text().replace("no_save: false", "no_save: true"))
    shown = table(last.parent)
    assert shown.names[1:] == ["in_stages", "in_stages/stage1_bitla_w2a2"]
    early = shown.rows["in_stages/stage1_bitla_w2a2"]
    assert (early["precision"], early["status"], early["planned"]) == (
        "bitla_w2a2",
        "unfinished",
        "20",
    )
    assert (last / stage / "evaluation.json").is_file()


def test_interrupted(
    table: Callable,
    make_run: Callable,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """What was measured is shown and kept."""
    for name in "ab":
        make_run(f"exp/{name}", calibrated("bitla_w1a1"))
    measure, calls = Reference.measure, []

    def interrupted(self: Reference, candidate: Candidate) -> object:
        calls.append(candidate)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return measure(self, candidate)

    with monkeypatch.context() as context:
        context.setattr(Reference, "measure", interrupted)
        shown = table(tmp_path / "exp")
    assert shown.status == 130
    assert shown.rows["a"]["cosine"] != "" == shown.rows["b"]["cosine"]
    again = table(tmp_path / "exp")
    assert again.status == 0
    assert "measuring 1 of 1: b" in again.errors


def test_folders_that_cannot_be_written(
    table: Callable,
    make_run: Callable,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    folder = make_run("exp/a", calibrated("bitla_w1a1"))

    def refuse(path: Path) -> None:
        raise LowbitError(f"cannot write {path}")

    monkeypatch.setattr(run_quality, "atomic_write", refuse)
    assert table(tmp_path / "exp").rows["a"]["cosine"] != ""
    assert not (folder / "evaluation.json").exists()


def test_mistakes_of_the_command(
    make_run: Callable, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    folder = make_run("exp/a", None)
    for arguments, named in (
        ([tmp_path / "no_such_folder"], "no such file or folder"),
        ([tmp_path / "data", tmp_path / "gone"], "no run in this folder"),
        ([folder, "--data=/gone"], "--data /gone"),
        ([folder, "--teacher=/gone.pt"], "--teacher /gone.pt"),
        ([folder, f"--csv={tmp_path}"], "is a folder"),
        ([folder, f"--markdown={folder}/.hydra/config.yaml/t.md"], "cannot write"),
    ):
        assert main(["sweep-table", *map(str, arguments)]) == 2
        captured = capsys.readouterr()
        assert captured.err.startswith("error: ")
        assert named in captured.err
        assert not captured.out
    with pytest.raises(SystemExit):
        main(["sweep-table", str(folder), "--sort=beauty"])


# Order


def entry(name: str, size: float | None, best: float | None, updates: int) -> Entry:
    run = Run(
        folder=Path(name),
        checkpoint=Path(name),
        precision="float",
        rules=0,
        form=None,
        loss="distillation",
        data=None,
        teacher=None,
        planned=9,
        saves=True,
        updates=updates,
        best_loss=best,
        storage_mb=size,
    )
    return Entry(name, run)


@pytest.mark.parametrize(
    "sort, order",
    [
        ("storage", ["b", "c", "a", "d"]),
        ("name", ["a", "b", "c", "d"]),
        ("valid", ["d", "a", "b", "c"]),
        ("updates", ["c", "a", "b", "d"]),
        ("cosine", ["b", "c", "a", "d"]),
    ],
)
def test_order(sort: str, order: list[str]) -> None:
    entries = [
        entry("d", None, 0.1, 1),
        entry("c", 1.0, float("nan"), 9),
        entry("a", 2.0, 0.3, 5),
        entry("b", 1.0, 0.4, 4),
    ]
    (group,) = model_records(entries, sort)
    assert [record["name"] for record in group] == order


def test_what_the_paper_says() -> None:
    assert paper_wer("bitla_w1a1", "distillation") == 15.96
    assert paper_wer("bitla_w1a1", "hubert") == 18.93
    assert paper_wer("bitla_w4a4", "distillation") is None
    with_rules = replace(entry("a", 1.0, 0.5, 9).run, precision="bitla_w1a1", rules=1)
    (((record,)),) = model_records([Entry("a", with_rules)], "name")
    assert record["paper_wer"] is None


def test_the_form_of_before_is_named_and_never_taken_for_todays(
    table: Callable, make_run: Callable, tmp_path: Path
) -> None:
    for name, precision in (
        ("own", Precision("bitla_w1a1")),
        ("old", Precision("bitla_w1a1", form="paper")),
        ("squashed", Precision("sqwq_w1", form="paper")),
    ):
        make_run(f"exp/{name}", Hubert(SHAPE, precision=precision))
    # As a version wrote it that did not know the key.
    config = tmp_path / "exp/old/.hydra/config.yaml"
    config.write_text(re.sub(r" *form: paper\n", "", config.read_text()))
    shown = table(tmp_path / "exp", "--no-evaluate")
    assert {name: row["form"] for name, row in shown.rows.items() if "/" not in name} == {
        "own": "asymmetric",
        "old": "paper",
        "squashed": "",
    }
    assert "| old | bitla_w1a1, paper form |" in shown.markdown
    assert "| own | bitla_w1a1 |" in shown.markdown
    assert "| squashed | sqwq_w1 |" in shown.markdown


def test_a_table_of_before_there_were_forms_is_read(
    table: Callable, make_run: Callable, tmp_path: Path
) -> None:
    make_run("exp/a", calibrated("bitl_w2a2"))
    make_run("exp/b", calibrated("sqwq_w2"))
    shown = table(tmp_path / "exp", "--no-evaluate")
    old = tmp_path / "old.csv"
    with open(old, "w", newline="") as file:
        rows = [{k: v for k, v in row.items() if k != "form"} for row in shown.rows.values()]
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    forms = {record["name"]: record["form"] for record in read_csv(old)}
    assert (forms["a"], forms["b"]) == ("paper", None)


def test_results_are_plain_json(table: Callable, make_run: Callable, tmp_path: Path) -> None:
    folder = make_run("exp/a", calibrated("bitla_w1a1"))
    table(tmp_path / "exp")
    stored = json.loads((folder / "evaluation.json").read_text())
    assert len(stored["row"]["agreement"]["cosine"]) == 2
    assert stored["teacher"]["name"] == "float"
