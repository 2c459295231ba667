"""``fairseq-lowbit transcribe``: the words of recordings, by a model fine-tuned with CTC."""

import argparse
import logging
from collections.abc import Iterator
from pathlib import Path

import torch
from torch.nn import functional as F

from fairseq_lowbit.cli.device_option import add_device_argument, read_device
from fairseq_lowbit.data.audio import UnusableAudio, convert_audio
from fairseq_lowbit.data.manifest import read_manifest
from fairseq_lowbit.evaluation.transcription import require_units, transcribe
from fairseq_lowbit.evaluation.utterances import Utterances
from fairseq_lowbit.interop import SOURCES, LoadedModel, open_model
from fairseq_lowbit.models.extractor import receptive_field

HELP = "print what is said in recordings, by a model fine-tuned with asr_ctc"

logger = logging.getLogger(__name__)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", help=f"a fine-tuned model: {SOURCES}")
    parser.add_argument(
        "audio",
        nargs="+",
        type=Path,
        help="recordings of any rate and kind, of up to about half a minute; or manifests (.tsv)",
    )
    add_device_argument(parser)


def run(args: argparse.Namespace) -> int:
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    loaded = open_model(args.model, read_device(args))
    require_units(loaded)
    left_out = 0
    for path in _recordings(args.audio):
        try:
            print(f"{path}\t{_transcript(loaded, path)}", flush=True)
        except UnusableAudio as error:
            logger.warning(f"left out: {error}")
            left_out += 1
    return 1 if left_out else 0


def _recordings(paths: list[Path]) -> Iterator[Path]:
    for path in paths:
        if path.suffix == ".tsv":
            yield from read_manifest(path).files()
        else:
            yield path


def _transcript(loaded: LoadedModel, path: Path) -> str:
    """Alone, so that neither padding nor another recording has a part in it."""
    waveform = torch.from_numpy(convert_audio(path))
    if len(waveform) < receptive_field(loaded.model.conv_layers):
        raise UnusableAudio(path, f"only {len(waveform)} samples")
    if loaded.normalize:
        waveform = F.layer_norm(waveform, waveform.shape)
    batch = Utterances([0], waveform[None], torch.tensor([len(waveform)]))
    return transcribe(loaded, [batch])[0]
