"""``fairseq-lowbit report``: its sources, what is wrong with some of them, and many at once.

The whole page of real runs is in tests/plugin/test_report.py.
"""

import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch

from fairseq_lowbit.cli.main import main
from fairseq_lowbit.evaluation.agreement import Agreement
from fairseq_lowbit.evaluation.masked import MaskedAccuracy
from fairseq_lowbit.evaluation.quality import Quality
from fairseq_lowbit.interop import write_model
from fairseq_lowbit.interop.huggingface_writer import export
from fairseq_lowbit.models import Hubert, LoadedModel
from fairseq_lowbit.runs import run_quality
from fairseq_lowbit.runs.columns import ModelRecord
from fairseq_lowbit.runs.superb.results import Result, Settings, write_result
from fairseq_lowbit.runs.tables import write_csv
from tests.evaluation.conftest import SHAPE, calibrated
from tests.report.conftest import record_of, write_progress
from tests.report.page_parser import ReportPage

QUICK = ("--no-evaluate", "--no-dissect")


@dataclass(frozen=True)
class Shown:
    """What one call of the command printed and wrote."""

    status: int
    output: str
    errors: str
    page: ReportPage

    @property
    def problems(self) -> list[str]:
        lines = self.errors.splitlines()
        return [line.removeprefix("problem: ") for line in lines if line.startswith("problem: ")]

    @property
    def names(self) -> list[str]:
        """Of the comparison."""
        return [row[0] for row in self.page.comparison[1:]]


@pytest.fixture
def report(tmp_path: Path, capsys: pytest.CaptureFixture) -> Callable[..., Shown]:
    """``report(*arguments)``, which has to write a page."""

    def run(*arguments: object) -> Shown:
        file = tmp_path / "out" / "page.html"
        status = main(["report", *map(str, arguments), "-o", str(file)])
        captured = capsys.readouterr()
        return Shown(status, captured.out, captured.err, ReportPage.read(file))

    return run


@pytest.fixture
def refused(capsys: pytest.CaptureFixture) -> Callable[..., str]:
    """The one message of a call that must fail without output."""

    def run(*arguments: object) -> str:
        assert main(["report", *map(str, arguments)]) == 2
        captured = capsys.readouterr()
        assert not captured.out
        assert len(captured.err.splitlines()) == 1
        return captured.err.removeprefix("error: ").strip()

    return run


@pytest.fixture
def unmeasured(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Measuring fails the test."""

    def refuse(*args: object) -> None:
        raise AssertionError("measured")

    monkeypatch.setattr(run_quality, "open_model", refuse)
    return


# Sources


def test_results_of_superb_are_a_table_of_the_page(
    report: Callable, save: Callable, tmp_path: Path
) -> None:
    settings = Settings("ks", "/w2a2.pt", "/ks", 1e-4, 200000, 32, 1, (), None, "0.4.18", "")
    folder = tmp_path / "superb/w2a2/ks"
    folder.mkdir(parents=True)
    write_result(Result("w2a2", settings, {"ks_accuracy": 0.95}, 35.8, 0.15, folder))
    model = save("student", calibrated("bitla_w2a2"))
    page = report(model, "--superb", tmp_path / "superb", *QUICK).page
    heads, *rows = page.tables[1]
    assert heads == ["model", "storage MB", "runtime est.", "KS acc. %"]
    assert rows[0] == ["w2a2", "35.80", "0.150", "95.00"]
    assert ["DPHuBERT (published)", "47.18", "–", "96.36"] in rows
    assert (
        "ks: s3prl 0.4.18, learning rate 0.0001, 200000 updates of 1 x 32 utterances (w2a2)."
        in page.text
    )


def test_sources_that_are_not_well(
    report: Callable, make_run: Callable, save: Callable, tmp_path: Path
) -> None:
    """Each costs its own row only, and is told once on the page and once on stderr."""
    student = calibrated("bitla_w2a2")
    write_progress(make_run("exp/good", student), 10)
    make_run("exp/silent", student)
    (make_run("exp/failed", None) / "failure.txt").write_text("the loss is not finite\n")
    good = save("student", student)
    truncated, other, text = tmp_path / "half.pt", tmp_path / "lm.pt", tmp_path / "a.csv"
    truncated.write_bytes(good.read_bytes()[:5000])
    state = {"cfg": {"model": {"_name": "transformer_lm"}}, "model": {"decoder.w": torch.ones(2)}}
    torch.save(state, other)
    text.write_text("name,value\nx,1\n")
    sources = [tmp_path / "exp", good, truncated, other, text]
    shown = report(*sources, tmp_path / "gone", *QUICK)
    assert shown.status == 1
    for part in (
        f"{text} is not a table of sweep-table --csv: there is no column status",
        f"{tmp_path / 'gone'}: there is no such file or folder",
        f"half.pt: checkpoint {truncated} is truncated",
        f"lm.pt: checkpoint {other} holds a transformer_lm, not a HuBERT",
        "exp/failed: the loss is not finite",
        f"exp/silent: {tmp_path / 'exp' / 'silent' / 'checkpoints'} holds no progress.jsonl",
    ):
        assert sum(part in problem for problem in shown.problems) == 1, (part, shown.problems)
        assert part in shown.page.text
    assert len(shown.problems) == 6
    assert "5 models, 3 of them quantized; 3 could not be read" in shown.page.text
    assert "unreadable" in shown.page.row("lm.pt")[0]
    assert shown.page.row("lm.pt")[1] == "–"
    row = shown.page.row("exp/good")
    assert row[1] == "bitla_w2a2"
    assert float(row[2]) == pytest.approx(student.plan.bytes / 1e6, abs=0.005)
    assert "curve_distillation_loss_attention.png" in figures(tmp_path)


def test_checkpoints_that_break_their_reader_cost_their_own_rows_only(
    report: Callable, make_run: Callable, save: Callable
) -> None:
    student = calibrated("bitla_w1a1")

    def broken(name: str, change: Callable[[dict], object]) -> Path:
        path = save(name, student)
        state = torch.load(path)
        change(state)
        torch.save(state, path)
        return path

    files = [
        broken("shape", lambda state: state["cfg"]["model"].update(encoder_layers="x")),
        broken("rule", lambda state: state["cfg"]["model"].update(precision={"mood": "bad"})),
        broken("weight", lambda state: state["model"].update(mask_emb="x")),
    ]
    folder = make_run("exp/good", student)
    write_progress(folder, 3)
    shown = report(folder, *files, *QUICK)
    assert {problem.split(":")[0] for problem in shown.problems} == {path.name for path in files}
    assert shown.page.row("exp/good")[1] == "bitla_w1a1"
    assert "2 models, 1 of them quantized; 3 could not be read" in shown.page.text


def test_another_shape_rescales_no_runtime(
    report: Callable, make_run: Callable, model: Hubert, save: Callable
) -> None:
    """They are relative to the float model of the shape that most have."""
    folders = [make_run(f"exp/{name}", calibrated("bitla_w1a1")) for name in ("a", "b")]
    larger = save("larger", Hubert(replace(model.shape, encoder_layers=5)))
    alone = report(*folders, *QUICK)
    both = report(*folders, larger, *QUICK)
    column = [cell.split(" ")[0] for cell in alone.page.comparison[0]].index("runtime")
    assert alone.page.row("a")[column] == both.page.row("exp/a")[column]
    (teacher,) = (row for row in both.page.comparison if row[0].startswith("teacher "))
    assert teacher[column] == "1.000"
    assert float(both.page.row("larger.pt")[column]) > 1


def figures(folder: Path) -> set[str]:
    return {path.name for path in (folder / "out" / "page_figures").iterdir()}


def test_checkpoints_outside_of_runs(
    report: Callable, teacher: LoadedModel, save: Callable, data: Path, tmp_path: Path
) -> None:
    """They are measured like runs; what was measured is kept beside them."""
    student = calibrated("bitl_w4a4")
    path = tmp_path / "ptq.pt"
    state = torch.load(teacher.source)
    state["cfg"]["criterion"] = {"_name": "lowbit_hubert"}
    torch.save(state, teacher.source)
    write_model(path, student, teacher, data)
    arguments = (
        path,
        teacher.source,
        f"--data={data}",
        f"--teacher={teacher.source}",
        "--seconds=5",
    )
    shown = report(*arguments, "--no-dissect")
    assert shown.status == 0, shown.problems
    assert shown.names == ["teacher.pt", "ptq.pt"]
    row = shown.page.row("ptq.pt")
    assert row[1] == "bitl_w4a4, calibration"
    cosine = row[[cell.split(" ")[0] for cell in shown.page.comparison[0]].index("cosine")]
    assert -1 < float(cosine) < 1
    assert (tmp_path / "ptq.evaluation.json").is_file()
    assert "measuring 2 of 2" in shown.errors
    again = report(*arguments, "--no-dissect")
    assert "measuring" not in again.errors
    assert again.page.comparison == shown.page.comparison


def test_tables_made_before(
    report: Callable,
    make_run: Callable,
    teacher: LoadedModel,
    tmp_path: Path,
    unmeasured: None,
) -> None:
    """Known runs are not shown twice; runs that are gone are known by their numbers."""
    for name in ("kept", "gone"):
        make_run(f"exp/{name}", calibrated("bitla_w1a1"))
    table = tmp_path / "table.csv"
    assert main(["sweep-table", str(tmp_path / "exp"), "--no-evaluate", f"--csv={table}"]) == 0
    shutil.rmtree(tmp_path / "exp" / "gone")
    again = shutil.copy(table, tmp_path / "again.csv")
    shown = report(tmp_path / "exp", table, again, *QUICK)
    kept, gone = (shown.page.row(name) for name in ("kept", "gone"))
    assert sorted(shown.names) == sorted(["gone", "kept", teacher_name(tmp_path)])
    assert kept[3] != "–" == gone[3]
    assert gone[2] == kept[2]


def teacher_name(folder: Path) -> str:
    return f"teacher {folder.name}/teacher.pt"


def row_of(name: str, accuracy: float, cosine: float, megabytes: float) -> Quality:
    close = Agreement((0.99, cosine), (20.0, 3.0))
    return Quality(name, False, megabytes, close, MaskedAccuracy(accuracy, 0.1), {})


def test_a_teacher_that_is_a_run_is_shown_once(
    report: Callable, make_run: Callable, model: Hubert, tmp_path: Path, unmeasured: None
) -> None:
    folder = make_run("exp/teacher", model, teacher=None, loss="lowbit_hubert")
    checkpoint = folder / "checkpoints" / "checkpoint_last.pt"
    make_run("exp/student", calibrated("bitla_w1a1"), teacher=str(checkpoint))
    assert report(tmp_path / "exp", *QUICK).names == ["teacher", "student"]
    # Named by hand it is nobody's student either.
    given = report(tmp_path / "exp", f"--teacher={checkpoint}", *QUICK)
    assert given.names == ["teacher", "student"]


# Content


def test_whatever_a_user_named_is_text(
    report: Callable, make_run: Callable, tmp_path: Path, unmeasured: None
) -> None:
    name = '<img src="http:x" onerror=alert(1)>&amp;'
    folder = make_run(f"exp/{name}", calibrated("bitla_w1a1"), overrides=["a=</td><b>"])
    (folder / "failure.txt").write_text("<script>alert(2)</script>\n")
    shown = report(tmp_path / "exp", *QUICK)
    for text in (
        name,
        "a=</td><b>",
        "<script>alert(2)</script>",
    ):
        assert text in shown.page.text
    assert shown.page.html.count("<script>") == 1
    assert not shown.page.sources


def test_many_runs_are_told_apart_as_far_as_colours_go(
    report: Callable, tmp_path: Path, unmeasured: None
) -> None:
    """The Pareto front and the best have colours; the others are grey, and the caption says so."""
    records = [
        record_of(
            row_of(f"run{i:02d}", 0.2 + 0.01 * ((7 * i) % 30), 0.5 + i / 100, 1 + (11 * i) % 30),
            status="finished",
            precision="bitla_w1a1",
            rules=0,
            loss="distillation",
        )
        for i in range(30)
    ]
    shown = report(write_table(tmp_path / "t.csv", records), *QUICK)
    assert shown.status == 0
    assert len(shown.names) == 30
    assert "Grey: 22 more." in shown.page.text
    colors = [part.split('"')[0] for part in shown.page.html.split("background: ")[1:]]
    swatches = [color for color in colors if color.startswith("#") and len(color) == 7]
    assert len(swatches) == 30
    assert len(set(swatches)) == 9
    assert {
        "masked_accuracy_storage_mb.pdf",
        "cosine_storage_mb.png",
        "cosine_layers.png",
    } <= figures(tmp_path)
    assert not any("runtime" in name for name in figures(tmp_path))
    assert len(shown.page.html) < 1e6


def write_table(path: Path, records: list[ModelRecord]) -> Path:
    with open(path, "w") as file:
        write_csv([records], file)
    return path


def test_what_cannot_be_taken_apart(
    report: Callable, make_run: Callable, tmp_path: Path, unmeasured: None
) -> None:
    folder = make_run("exp/deaf", calibrated("bitla_w1a1"), data=str(tmp_path / "nothing"))
    write_progress(folder, 3)
    shown = report(folder, "--no-evaluate", "--dissect=deaf")
    assert shown.status == 1
    (problem,) = shown.problems
    assert problem.startswith(f"deaf could not be taken apart: no manifest {tmp_path}/nothing")
    assert (
        f"The models that --dissect named. deaf no manifest {tmp_path}/nothing" in shown.page.text
    )


# Mistakes of the command


def test_what_cannot_be_written_is_said_before_time_is_spent(
    refused: Callable, make_run: Callable, tmp_path: Path, unmeasured: None
) -> None:
    folder = make_run("exp/a", calibrated("bitla_w1a1"))
    file = folder / ".hydra" / "config.yaml"
    assert f"cannot write {file}/page.html" in refused(folder, "-o", file / "page.html")
    assert "is a folder: name a file" in refused(folder, "-o", tmp_path)
    (tmp_path / "page_figures").touch()
    message = refused(folder, "-o", tmp_path / "page.html")
    assert "a file is where a folder has to be" in message
    assert not (tmp_path / "page.html").exists()


def test_a_hugging_face_folder_is_a_row_and_a_teacher(
    report: Callable, data: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "hubert"
    torch.manual_seed(0)
    export(LoadedModel(Hubert(SHAPE).eval(), "teacher.pt", 0, True, normalize=False), folder)
    held = sorted(path.name for path in folder.iterdir())
    arguments = (folder, "--data", data, "--teacher", folder, "--seconds", 2)
    first = report(*arguments)
    assert (first.status, first.problems, first.names) == (0, [], ["hubert"])
    assert "measuring 1 of 1" in first.errors
    assert "measuring" not in report(*arguments).errors
    assert sorted(path.name for path in folder.iterdir()) == held

    os.utime(folder / "model.safetensors", (1, 1))
    assert "measuring" in report(*arguments).errors


def test_mistakes(refused: Callable, make_run: Callable, tmp_path: Path, unmeasured: None) -> None:
    folder = make_run("exp/a", calibrated("bitla_w1a1"))
    (tmp_path / "empty").mkdir()
    out = ("-o", tmp_path / "new" / "page.html")
    for arguments, named in (
        ([tmp_path / "gone"], f"{tmp_path}/gone: there is no such file or folder"),
        ([tmp_path / "empty"], f"{tmp_path}/empty: no run in this folder"),
        ([tmp_path / "gone.csv"], "gone.csv"),
        ([folder, "--data=/gone"], "--data /gone holds no test.tsv"),
        ([folder, "--teacher=/gone.pt"], "--teacher /gone.pt does not exist"),
        (
            [folder, "--dissect=b"],
            "--dissect b: there is no such run with a checkpoint; there are a",
        ),
        ([folder, "--dissect=a", "--no-dissect"], "contradict"),
        ([folder, "--seconds=0"], "--seconds 0.0: give a number above 0"),
        ([folder, "--seconds=-1"], "--seconds -1.0"),
        ([folder, "--seconds=nan"], "--seconds nan"),
    ):
        assert named in refused(*arguments, *out)
        assert not (tmp_path / "new").exists()


def test_a_page_is_replaced_whole_or_not_at_all(
    report: Callable,
    make_run: Callable,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    make_run("exp/a", calibrated("bitla_w1a1"))
    before = report(tmp_path / "exp", *QUICK).page.html

    def fail(*args: object, **kwargs: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("fairseq_lowbit.cli.report.all_details", fail)
    page = tmp_path / "out" / "page.html"
    assert main(["report", str(tmp_path / "exp"), "-o", str(page), *QUICK]) == 130
    assert page.read_text() == before
    assert not list(page.parent.glob(".*"))
