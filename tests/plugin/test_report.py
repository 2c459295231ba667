"""``fairseq-lowbit report`` on runs as the real command leaves them; and the page in a browser."""

import contextlib
import io
import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

import pytest

from fairseq_lowbit.cli.main import main
from fairseq_lowbit.interop import open_model
from fairseq_lowbit.profiling import profile
from tests.plugin.conftest import Run, Trainer
from tests.report.page_parser import ReportPage

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
SCHEDULE = "task.stages=[{precision:w1a2,updates:3},{precision:w1a1,updates:4}]"


@dataclass(frozen=True)
class Report:
    """What the command left."""

    file: Path
    page: ReportPage
    status: int
    problems: str
    student: Path

    def figure(self, name: str) -> bool:
        """Whether it is there in both formats, and not empty."""
        folder = self.file.with_name("page_figures")
        return all((folder / f"{name}.{kind}").stat().st_size > 1000 for kind in ("png", "pdf"))


@pytest.fixture(scope="module")
def report(
    trainer: Trainer,
    teacher_run: Run,
    student_run: Run,
    tmp_path_factory: pytest.TempPathFactory,
) -> Report:
    """A teacher, its student, and a resumed run in stages whose log is JSON, on one page."""
    folder = tmp_path_factory.mktemp("report")
    for name, run in (("teacher", teacher_run), ("student", student_run)):
        shutil.copytree(run.folder, folder / "exp" / name)  # the report leaves a file in each
    teacher = folder / "exp" / "teacher" / "checkpoints" / "checkpoint_last.pt"
    common = (f"task.teacher={teacher}", "common.log_format=json", "checkpoint.no_save=false")
    for updates in (2, 4):
        stages = SCHEDULE.replace("updates:4", f"updates:{updates}")
        staged = trainer.fork(folder / "exp" / "staged", "bitla_w1a1", *common, stages)
        assert staged.status == 0, staged.output
    file = folder / "page.html"
    said = io.StringIO()
    with contextlib.redirect_stderr(said):
        status = main(["report", str(folder / "exp"), "-o", str(file), f"--teacher={teacher}"])
    problems = "\n".join(line for line in said.getvalue().splitlines() if "problem: " in line)
    return Report(file, ReportPage.read(file), status, problems, folder / "exp" / "student")


def test_the_comparison(report: Report) -> None:
    assert (report.status, report.problems) == (0, "")
    names = [row[0].split(" ")[0] for row in report.page.comparison[1:]]
    shown = ["teacher", "staged", "staged/stage1_bitla_w1a2", "student"]
    assert names[0] == "teacher"
    assert sorted(names) == sorted(shown)
    model = open_model(report.student / "checkpoints" / "checkpoint_last.pt").model
    counted = profile(model, "student")
    head, cells = report.page.comparison[0], report.page.row("student")
    assert head[0] == "model"
    found = {title.split(" ")[0]: cell for title, cell in zip(head, cells, strict=True)}
    assert found["precision"] == "bitla_w1a1"
    assert found["storage"] == f"{counted.storage_bytes / 1e6:.2f}"
    assert found["FLOPs"] == f"{counted.flops / 1e9:.2f}"
    assert found["QuantOps"] == f"{counted.quantops / 1e9:.2f}"
    # Relative to its teacher, which is its own shape in float.
    assert 0 < float(found["runtime"]) < 1
    assert report.page.row("teacher")[5] == "1.000"
    assert 0 < float(found["masked"]) <= 100
    assert -1 <= float(found["cosine"]) <= 1


def test_every_loss_term_has_its_curves(report: Report) -> None:
    for term in ("loss", "loss_final", "loss_layers", "loss_attention"):
        assert report.figure(f"curve_distillation_{term}")
    for term in ("loss", "loss_masked", "loss_unmasked", "accuracy"):
        assert report.figure(f"curve_hubert_{term}")
    assert "loss_features" not in report.page.text
    for key in ("sqnr_db", "clipped", "levels_used", "centered_std"):
        assert report.figure(f"health_{key}")


def test_quality_against_cost(report: Report) -> None:
    for quality in ("masked_accuracy", "cosine", "snr_db"):
        for cost in ("storage_mb", "runtime"):
            assert report.figure(f"{quality}_{cost}")
    for quality in ("cosine", "snr_db"):
        assert report.figure(f"{quality}_layers")


def test_the_best_are_taken_apart(report: Report) -> None:
    text = report.page.text
    assert re.search(r"\d of the 3 quantized models with a checkpoint, on the Pareto", text)
    assert re.search(r"On 1\.\d s of held-out audio \(audio/test\d\d\.flac\), beside", text)
    assert any(image.startswith("attention moved from ") for image in report.page.images)
    assert any(image.startswith("SQNR from ") for image in report.page.images)


def test_what_decided_the_bits(report: Report) -> None:
    rows = [row for table in report.page.tables[1:] for row in table]
    (row,) = (
        row for row in rows if row[0] == "encoder.layers.{0-1}.fc1" and row[1] == "bitla_w1a2"
    )
    assert row[1:5] == ["bitla_w1a2", "elastic", "1", "2"]
    assert "calibration: batches: 2" in report.page.text
    assert "fairseq_lowbit" in report.page.text.split("Environment")[-1]


def test_the_page_needs_nothing_else(report: Report) -> None:
    page = report.page
    assert page.sources
    assert all(source.startswith("data:image/") for source in page.sources)
    assert {f"#{name}" for name in page.ids} >= set(page.links)
    assert len(set(page.ids)) == len(page.ids)
    assert not re.search(r"https?:|@import|url\(", page.html)
    assert all(page.images)
    assert report.file.stat().st_size < 5e6


def browser() -> str | None:
    return next(filter(None, map(shutil.which, BROWSERS)), None)


# Reports to the page around it how wide it is, and by how much its content is wider.
MEASURE = """<script>addEventListener("load", () => {
  const wider = document.documentElement.scrollWidth - document.documentElement.clientWidth;
  const images = [...document.images].filter(i => !(i.complete && i.naturalWidth)).length;
  parent.postMessage([innerWidth, wider, images].join(" "), "*");
});</script></body>"""
# Frames, because no window of a browser is as narrow as a phone.
AROUND = """<!DOCTYPE html><body><script>
addEventListener("message", message => document.body.append(`[${message.data}]`));
for (const width of [390, 1280]) {
  const frame = document.createElement("iframe");
  Object.assign(frame, {width, height: 800, src: "measured.html"});
  document.body.append(frame);
}
</script></body>"""


@pytest.mark.skipif(browser() is None, reason=f"no browser on PATH: {', '.join(BROWSERS)}")
def test_in_a_browser(report: Report, tmp_path: Path) -> None:
    """No complaint on its console, and nothing to scroll sideways on a phone or a desktop."""
    html = report.page.html.replace("<details", "<details open")
    assert html.count("</body>") == 1
    (tmp_path / "measured.html").write_text(html.replace("</body>", MEASURE))
    (tmp_path / "around.html").write_text(AROUND)
    dom, console = visit(tmp_path / "around.html", tmp_path / "profile")
    measured = sorted(tuple(map(int, found)) for found in re.findall(r"\[(\d+) (\d+) (\d+)\]", dom))
    assert measured == [(390, 0, 0), (1280, 0, 0)], dom[-500:]
    assert not console


def visit(file: Path, profile_folder: Path) -> tuple[str, list[str]]:
    """The document after its scripts have run, and the lines of its console."""
    options = ["--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-sync"]
    options += ["--disable-background-networking", "--disable-component-update"]
    options += ["--enable-logging=stderr", "--virtual-time-budget=10000", "--dump-dom"]
    done = subprocess.run(
        [browser(), *options, f"--user-data-dir={profile_folder}", f"file://{file}"],
        capture_output=True,
        text=True,
        check=True,
        timeout=120,
    )
    return done.stdout, [line for line in done.stderr.splitlines() if "CONSOLE" in line]
