"""``fairseq-lowbit wer``: word errors of models, or of transcripts from elsewhere, side by side."""

import argparse
import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

from rich.table import Table
from tqdm import tqdm

from fairseq_lowbit.cli.device_option import add_device_argument, read_device
from fairseq_lowbit.cli.names import read_named
from fairseq_lowbit.data.manifest import Manifest, read_manifest
from fairseq_lowbit.data.progress import tqdm_options
from fairseq_lowbit.data.transcripts import (
    read_lines,
    read_speakers,
    read_transcripts,
    transcript_path,
)
from fairseq_lowbit.errors import LowbitError
from fairseq_lowbit.evaluation.ngram import NgramDecoder
from fairseq_lowbit.evaluation.recognition import (
    WORD_ERRORS_FILE,
    Recognition,
    Recognizer,
    Row,
    check_names,
)
from fairseq_lowbit.evaluation.transcription import greedy, require_units, transcribe
from fairseq_lowbit.evaluation.utterances import Utterances, read_batches
from fairseq_lowbit.files import check_writable
from fairseq_lowbit.interop import SOURCES, LoadedModel, open_model
from fairseq_lowbit.report.overview.word_error_figure import draw_word_errors
from fairseq_lowbit.runs.columns import UNKNOWN
from fairseq_lowbit.terminal import print_table

HELP = "compare recognizers by word errors: table, figure, JSON, transcripts"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "models",
        nargs="*",
        metavar="NAME=MODEL",
        help=f"models fine-tuned with asr_ctc; the others are compared with the first. {SOURCES}",
    )
    parser.add_argument("--data", type=Path, help="folder with the manifest and its .wrd")
    parser.add_argument("--split", default="test", help="what to transcribe (default %(default)s)")
    parser.add_argument(
        "--lm",
        type=Path,
        help="decode with this ARPA file of fairseq-lowbit ngram (default: the best letter of each "
        "frame)",
    )
    parser.add_argument("--out", type=Path, required=True, help="folder for the results")
    parser.add_argument(
        "--references", type=Path, help="instead of --data: what was said, a line per utterance"
    )
    parser.add_argument(
        "--hypotheses",
        nargs="+",
        default=[],
        metavar="NAME=FILE",
        help="with --references: transcripts of any system, line by line",
    )
    add_device_argument(parser)


def run(args: argparse.Namespace) -> int:
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    from_text = bool(args.references or args.hypotheses)
    if args.lm and from_text:
        raise LowbitError("--lm decodes models: transcripts of --hypotheses are decoded already")
    if from_text == bool(args.data or args.models):
        raise LowbitError(
            "give either NAME=MODEL... with --data, or --references with --hypotheses NAME=FILE..."
        )
    device = read_device(args)
    check_writable(args.out / WORD_ERRORS_FILE)
    recognition = _compare_texts(args) if from_text else _compare_models(args, device)
    recognition.write(args.out)
    figure = args.out / "wer.png"
    draw_word_errors(recognition, figure)
    print_table(_table(recognition))
    for finding in recognition.findings():
        print(finding)
    print(f"figure {figure}, numbers {args.out / WORD_ERRORS_FILE}, transcripts beside them")
    return 0


def _named(texts: Sequence[str], kind: str) -> dict[str, str]:
    """What stands behind each name."""
    pairs = [read_named(text, kind) for text in texts]
    check_names([name for name, _ in pairs])
    return dict(pairs)


def _compare_texts(args: argparse.Namespace) -> Recognition:
    if not (args.references and args.hypotheses):
        raise LowbitError("--references and --hypotheses belong together: give both")
    files = _named(args.hypotheses, "FILE")
    references = _lines(args.references)
    recognizers = [Recognizer(name, _lines(Path(path))) for name, path in files.items()]
    for recognizer in recognizers:
        if len(recognizer.transcripts) != len(references):
            raise LowbitError(
                f"{files[recognizer.name]} has {len(recognizer.transcripts)} lines and "
                f"{args.references} has {len(references)}: they do not belong together"
            )
    names = [f"line {number}" for number in range(1, len(references) + 1)]
    return Recognition(names, references, None, recognizers)


def _lines(path: Path) -> list[str]:
    if not path.is_file():
        raise LowbitError(f"there is no file of transcripts {path}")
    return read_lines(path)


def _compare_models(args: argparse.Namespace, device: str) -> Recognition:
    if not (args.data and args.models):
        raise LowbitError("NAME=MODEL... and --data belong together: give both")
    sources = _named(args.models, "MODEL")
    manifest = read_manifest(args.data / f"{args.split}.tsv")
    references, speakers = read_transcripts(manifest), read_speakers(manifest)
    models = {name: open_model(source, device) for name, source in sources.items()}
    for loaded in models.values():
        require_units(loaded)
        _check_letters(loaded, references, transcript_path(manifest))
    # One for all models of the same units, as it takes long to read a language model.
    decoders = {
        units: NgramDecoder(args.lm, units) if args.lm else greedy
        for units in {loaded.units for loaded in models.values()}
    }
    heard = {
        name: _transcribed(name, loaded, manifest, decoders[loaded.units])
        for name, loaded in models.items()
    }
    # Files that cannot be read are missing in all of them.
    lines = sorted(next(iter(heard.values())))
    recognizers = [
        Recognizer(
            name,
            [texts[line] for line in lines],
            models[name].model.plan.precision.name,
            models[name].model.plan.bytes / 1e6,
        )
        for name, texts in heard.items()
    ]
    chosen = ([every[line] for line in lines] for every in (manifest.names, references, speakers))
    return Recognition(*chosen, recognizers, str(args.lm or ""))


def _check_letters(loaded: LoadedModel, references: Sequence[str], path: Path) -> None:
    """Refuses references that are mostly of letters which the model cannot write, such as capital
    ones: nearly every word would be wrong."""
    said = [char for text in references for char in text if char != " "]
    foreign = set(said).difference(*loaded.units)
    if 2 * sum(char in foreign for char in said) > len(said):
        raise LowbitError(
            f"{path} and {loaded.source} are of different letters: the model cannot write "
            f"{' '.join(sorted(foreign)[:5])}, which most of the transcripts is made of"
        )


def _transcribed(
    name: str, loaded: LoadedModel, manifest: Manifest, decode: Callable
) -> dict[int, str]:
    """The transcript of every usable file, by its line."""
    batches = read_batches(manifest, list(range(len(manifest))), loaded.normalize)
    return transcribe(loaded, _counted(batches, name, len(manifest)), decode)


def _counted(batches: Iterable[Utterances], name: str, total: int) -> Iterator[Utterances]:
    """Shows how many utterances have gone by."""
    with tqdm(total=total, desc=f"transcribing by {name}", **tqdm_options()) as bar:
        for batch in batches:
            yield batch
            bar.update(len(batch.lines))


def _table(recognition: Recognition) -> Table:
    voices = "" if recognition.speakers is None else f", {len(set(recognition.speakers))} speakers"
    model = recognition.language_model
    decoding = f", decoded with {model}" if model else ""
    sentences = len(recognition.references)
    first = recognition.rows[0]
    table = Table(
        title=f"{sentences} sentences of {recognition.words} words{voices}{decoding}",
        title_justify="left",
    )
    table.add_column("model", overflow="fold")
    heads = (
        "precision",
        "storage\nMB",
        f"WER %\n({first.wer.level:.0%} interval)",
        "CER %",
        "sub",
        "del",
        "ins",
        f"MAPSSWE p\nagainst {first.name}",
    )
    for head in heads:
        table.add_column(head, justify="left" if head == "precision" else "right")
    for row in recognition.rows:
        table.add_row(row.name, *_cells(row))
    return table


def _cells(row: Row) -> tuple[str, ...]:
    """Those behind the name."""
    wer = row.wer
    return (
        row.precision or UNKNOWN,
        UNKNOWN if row.storage_mb is None else f"{row.storage_mb:.2f}",
        f"{100 * wer.value:.1f} ({100 * wer.low:.1f} to {100 * wer.high:.1f})",
        f"{100 * row.cer.value:.1f}",
        *(str(count) for count in (row.substitutions, row.deletions, row.insertions)),
        UNKNOWN if row.pairs is None else row.pairs.p_text,
    )
