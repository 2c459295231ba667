"""The table of SUPERB's results, from result folders written by hand."""

import csv
import json
from dataclasses import replace
from pathlib import Path

import pytest

from fairseq_lowbit.cli import main
from fairseq_lowbit.errors import LowbitError
from fairseq_lowbit.runs.superb.results import (
    Result,
    Settings,
    collect_results,
    read_result,
    write_result,
)

KS = Settings("ks", "/w1a1.pt", "/ks", 0.0001, 200000, 32, 1, (), None, "0.4.18", "")
ASR = replace(KS, task="asr", data="/ls")


def put(
    folder: Path, name: str, settings: Settings = KS, figure: float = 0.9512, storage: float = 25.23
) -> Result:
    key = {"ks": "ks_accuracy", "asr": "asr_wer"}[settings.task]
    place = folder / name / settings.task
    place.mkdir(parents=True)
    result = Result(name, settings, {key: figure}, storage, 0.123, place)
    write_result(result)
    return result


def lines_of(printed: str) -> dict[str, list[str]]:
    """Cells by the name in the first one."""
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in printed.splitlines()]
    return {row[0]: row[1:] for row in rows if row}


def test_a_result_is_read_as_it_was_written(tmp_path: Path) -> None:
    result = put(tmp_path, "w1a1", replace(KS, changed=("optimizer.lr=0.0001",)))
    assert read_result(result.folder) == result


def test_models_stand_beside_published_ones(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    put(tmp_path, "w1a1")
    put(tmp_path, "w1a1", ASR, figure=16.5)
    put(
        tmp_path, "fp", replace(KS, learning_rate=0.001, changed=("optimizer.lr=0.001",)), 0.96, 184
    )
    places = [str(tmp_path), "--csv", str(tmp_path / "t.csv"), "--markdown", str(tmp_path / "t.md")]
    assert main.main(["superb-table", *places]) == 0
    printed = capsys.readouterr().out
    assert (
        "ks: s3prl 0.4.18, learning rate 0.001, 200000 updates of 1 x 32 utterances (fp)."
        in printed
    )
    written = lines_of((tmp_path / "t.md").read_text())
    assert written["model"] == ["storage MB", "runtime est.", "ASR WER %", "KS acc. %"]
    assert written["fp"] == ["184.00", "0.123", "–", "96.00"]
    assert written["w1a1"] == ["25.23", "0.123", "16.50", "95.12"]
    assert written["HuBERT Base"] == ["189.36", "1.380", "6.42", "96.30"]
    assert written["BiT-LA W1A1"] == ["25.23", "0.120", "15.96", "–"]
    assert list(written).index("fp") < list(written).index("w1a1")
    assert "other settings" not in (tmp_path / "t.md").read_text()
    with open(tmp_path / "t.csv", newline="", encoding="utf-8") as file:
        rows = {row["model"]: row for row in csv.DictReader(file)}
    assert float(rows["w1a1"]["KS acc. %"]) == pytest.approx(95.12)
    assert (rows["w1a1"]["published"], rows["DPHuBERT"]["published"]) == ("no", "yes")


def test_rehearsals_are_marked(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    put(tmp_path, "w1a1", replace(KS, updates=20, changed=("runner.total_steps=20",)))
    assert main.main(["superb-table", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    assert "95.12*" in printed
    assert "* made with other settings than SUPERB's" in printed


def test_results_that_cannot_be_compared_are_refused(tmp_path: Path) -> None:
    first = put(tmp_path, "fp")
    second = put(tmp_path, "w1a1", replace(KS, updates=20, changed=("runner.total_steps=20",)))
    expected = (
        "are of different protocols: ks with runner.total_steps=20 and with SUPERB's own settings "
        "cannot stand in one table"
    )
    with pytest.raises(LowbitError, match=expected):
        collect_results([first.folder, second.folder])
    other = put(tmp_path, "w2a2", replace(KS, inputs="0a1b"))
    with pytest.raises(
        LowbitError, match=r"ks with vocabularies or lists of /ks \(0a1b\) and with"
    ):
        collect_results([first.folder, other.folder])
    renamed = put(tmp_path / "other", "fp", replace(ASR, model="/w2a2.pt"), 16.5)
    with pytest.raises(LowbitError, match="are of different models that are both named fp: /w1a1"):
        collect_results([first.folder, renamed.folder])
    retrained = [
        put(tmp_path / key, "fp", replace(settings, checkpoint=key))
        for key, settings in (("one", KS), ("two", replace(ASR, model=KS.model)))
    ]
    with pytest.raises(LowbitError, match=r"/w1a1\.pt was changed between .*one.* and .*two"):
        collect_results([result.folder for result in retrained])
    put(tmp_path / "again", "fp")
    with pytest.raises(LowbitError, match="are both ks of fp: name one"):
        collect_results([tmp_path / "fp", tmp_path / "again"])
    with pytest.raises(LowbitError, match=r"nothing: there is no result\.json"):
        collect_results([tmp_path / "nothing"])


def test_a_file_of_another_protocol_or_kind_is_named(tmp_path: Path) -> None:
    path = put(tmp_path, "fp").folder / "result.json"
    content = json.loads(path.read_text())
    content["settings"]["protocol"] = "SUPERB, 0"
    path.write_text(json.dumps(content))
    with pytest.raises(LowbitError, match=r"result\.json is of another protocol, 'SUPERB, 0'"):
        collect_results([tmp_path])
    path.write_text("[1]")
    with pytest.raises(LowbitError, match=r"result\.json is no result of fairseq-lowbit superb"):
        collect_results([tmp_path])
