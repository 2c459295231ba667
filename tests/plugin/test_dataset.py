"""What a batch holds, and that it depends on seed, epoch and index alone."""

from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import torch
from fairseq.dataclass import FairseqDataclass
from fairseq.tasks import FairseqTask

from fairseq_lowbit.configurations import compose_config
from fairseq_lowbit.data.calibration_audio import CalibrationConfig
from fairseq_lowbit.data.label_file import LabelFile
from fairseq_lowbit.data.manifest import read_manifest
from fairseq_lowbit.data.recordings import AudioOptions
from fairseq_lowbit.errors import LowbitError
from fairseq_lowbit.plugin.dataset import NO_LABEL, SpeechDataset

# Shorter than every file: all sizes tie, and every utterance is cut at random.
CUT = AudioOptions(max_size=12_000)


def open_dataset(corpus: Path, options: AudioOptions = CUT) -> SpeechDataset:
    labels = (LabelFile(corpus / "train.km", corpus / "dict.km.txt"),)
    return SpeechDataset(read_manifest(corpus / "train.tsv"), options, labels)


def batches_of(task: FairseqTask, dataset: SpeechDataset, epoch: int, workers: int) -> list[dict]:
    iterator = task.get_batch_iterator(
        dataset, max_tokens=48_000, seed=1, num_workers=workers, epoch=epoch
    )
    return list(iterator.next_epoch_itr(shuffle=True))


@pytest.mark.parametrize("workers", [0, 1])
def test_a_resumed_epoch_is_the_uninterrupted_one(corpus: Path, workers: int) -> None:
    task, dataset = FairseqTask(FairseqDataclass()), open_dataset(corpus)
    uninterrupted = [batches_of(task, dataset, epoch, workers) for epoch in (1, 2, 3)]
    resumed = batches_of(FairseqTask(FairseqDataclass()), open_dataset(corpus), 3, workers)
    for own, expected in zip(resumed, uninterrupted[2], strict=True):
        assert own["names"] == expected["names"]
        assert torch.equal(own["waveform"], expected["waveform"])
        assert torch.equal(own["targets"][0], expected["targets"][0])


def test_every_epoch_cuts_elsewhere(corpus: Path) -> None:
    task, dataset = FairseqTask(FairseqDataclass()), open_dataset(corpus)
    cuts = []
    for epoch in (1, 2):
        rows = {}
        for batch in batches_of(task, dataset, epoch, workers=1):
            rows.update(zip(batch["names"], batch["waveform"], strict=True))
        cuts.append(rows)
    same = [torch.equal(cuts[0][name], cuts[1][name]) for name in cuts[0]]
    assert sum(same) < len(same) / 2


def test_labels_are_cut_with_the_audio(corpus: Path) -> None:
    dataset = open_dataset(corpus)
    dataset.set_epoch(2)
    sample = dataset[0]
    batch = dataset.collater([sample])
    start = next(
        s
        for s in range(0, len(sample.audio) - 12_000 + 1, 320)
        if torch.equal(sample.audio[s : s + 12_000], batch["waveform"][0])
    )
    expected = dataset.labels[0][sample.line][start // 320 :]
    assert batch["targets"][0][0].tolist() == expected.tolist()


def test_padded_batches_say_what_is_valid(corpus: Path) -> None:
    dataset = open_dataset(corpus, AudioOptions(pad_audio=True))
    batch = dataset.collater([dataset[0], dataset[1]])
    assert batch["lengths"].tolist() == batch["sizes"]
    shorter = int(np.argmin(batch["sizes"]))
    assert batch["waveform"][shorter, batch["sizes"][shorter] :].abs().sum() == 0
    assert (batch["targets"][0] == NO_LABEL).any()


def test_another_label_rate_is_refused(corpus: Path) -> None:
    with pytest.raises(LowbitError, match=r"train\.km line 1 has .* set task\.label_rate to 50"):
        open_dataset(corpus, AudioOptions(label_rate=100.0))


def test_a_substitute_is_the_next_in_size(broken: Path) -> None:
    dataset = open_dataset(broken)
    damaged = dataset[3].name
    (broken / damaged).write_bytes(b"not audio")
    again = dataset[3]
    assert again.name != damaged
    assert [name for name, _ in again.unusable] == [damaged]


def test_the_configuration_names_the_defaults_of_calibration() -> None:
    """For whoever reads it; the code has the same ones for a task without such settings."""
    assert compose_config("bitla_w2a2", []).task.calibration == asdict(CalibrationConfig())
