"""Transcripts of a model with a CTC head."""

from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch

from fairseq_lowbit.cli.main import main
from fairseq_lowbit.data.manifest import write_manifest
from fairseq_lowbit.errors import LowbitError
from fairseq_lowbit.evaluation.transcription import greedy, log_probabilities, transcribe
from fairseq_lowbit.evaluation.utterances import Utterances
from fairseq_lowbit.interop.checkpoint import as_checkpoint
from fairseq_lowbit.models import Hubert, LoadedModel
from tests.shapes import TINY

UNITS = ("", "|", "a", "b", "c")


@pytest.fixture(scope="module")
def recognizer() -> LoadedModel:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = Hubert(TINY, units=len(UNITS)).eval()
        torch.nn.init.normal_(model.ctc_proj.weight)
    return LoadedModel(model, "r.pt", 0, True, normalize=True, units=UNITS)


def noise(samples: int, seed: int = 0) -> torch.Tensor:
    return 0.1 * torch.randn(samples, generator=torch.Generator().manual_seed(seed))


def test_greedy_reads_the_best_unit_of_every_frame() -> None:
    best = torch.tensor([2, 2, 0, 2, 1, 1, 0, 3, 4, 0])
    scores = torch.nn.functional.one_hot(best, len(UNITS)).float().log()
    assert greedy(scores, UNITS) == "aa bc"


def test_padding_changes_nothing(recognizer: LoadedModel) -> None:
    short, long = noise(900, 1), noise(1500, 2)
    padded = torch.nn.utils.rnn.pad_sequence([long, short], batch_first=True)
    together = Utterances([3, 8], padded, torch.tensor([1500, 900]))
    alone = Utterances([8], short[None], torch.tensor([900]))
    scores, single = (
        log_probabilities(recognizer, together)[1],
        log_probabilities(recognizer, alone),
    )
    torch.testing.assert_close(scores, single[0], atol=1e-5, rtol=0)
    torch.testing.assert_close(scores.exp().sum(-1), torch.ones(len(scores)))
    texts = transcribe(recognizer, [together])
    assert list(texts) == [3, 8]
    assert texts[8] == transcribe(recognizer, [alone])[8] != ""


def test_the_command_takes_files_of_any_rate_and_manifests(
    tmp_path: Path, recognizer: LoadedModel, capsys: pytest.CaptureFixture
) -> None:
    torch.save(as_checkpoint(recognizer), tmp_path / "r.pt")
    stereo = np.stack([noise(2000).numpy()] * 2, 1)
    soundfile.write(tmp_path / "a.wav", noise(2000).numpy(), 16000)
    soundfile.write(tmp_path / "b.wav", stereo, 8000)
    write_manifest(tmp_path / "some.tsv", tmp_path, [("a.wav", 2000)])
    (tmp_path / "empty.wav").touch()
    files = [str(tmp_path / name) for name in ("b.wav", "some.tsv", "empty.wav", "a.wav")]
    assert main(["transcribe", str(tmp_path / "r.pt"), *files]) == 1
    lines = [line.split("\t") for line in capsys.readouterr().out.splitlines()]
    assert [Path(path).name for path, _ in lines] == ["b.wav", "a.wav", "a.wav"]
    assert lines[1] == lines[2]
    assert lines[1][1]
    assert main(["transcribe", str(tmp_path / "r.pt"), str(tmp_path / "a.wav")]) == 0


def test_a_model_without_a_head_is_refused() -> None:
    encoder = LoadedModel(Hubert(TINY), "e.pt", 0, True, normalize=False)
    with pytest.raises(LowbitError, match=r"e\.pt has no CTC head .* asr_ctc"):
        transcribe(encoder, [Utterances([0], noise(900)[None], torch.tensor([900]))])
