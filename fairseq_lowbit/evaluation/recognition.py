"""Recognizers side by side: word errors of the same utterances, and which differ."""

import json
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from fairseq_lowbit.errors import LowbitError
from fairseq_lowbit.evaluation.intervals import Interval
from fairseq_lowbit.evaluation.word_errors import (
    MatchedPairs,
    UtteranceErrors,
    character_error_rate,
    count_errors,
    matched_pairs,
    word_error_difference,
    word_error_rate,
)
from fairseq_lowbit.files import atomic_write

WORD_ERRORS_FILE = "wer.json"
REFERENCES_FILE = "references.txt"
# Above this word error rate of the first row, differences between rows mean little.
INFORMATIVE = 0.5


@dataclass(frozen=True)
class Recognizer:
    """What one system recognized.

    Attributes:
        transcripts: of every utterance.
        precision: name of the model's; None of transcripts from elsewhere.
        storage_mb: stored bytes of all parameters in 1e6; None of transcripts from elsewhere.
    """

    name: str
    transcripts: Sequence[str]
    precision: str | None = None
    storage_mb: float | None = None


@dataclass(frozen=True)
class Row:
    """The word errors of one system, with intervals.

    Attributes:
        difference: the word error rate less that of the first row, which has None.
        pairs: matched-pairs test against the first row, which has None.
    """

    name: str
    precision: str | None
    storage_mb: float | None
    wer: Interval
    cer: Interval
    substitutions: int
    deletions: int
    insertions: int
    difference: Interval | None
    pairs: MatchedPairs | None


class Recognition:
    """Systems on the same utterances; the others are compared with the first.

    Args:
        names: of the utterances.
        references: what was said in each.
        speakers: of each, whom intervals draw as a whole; None draws utterances.
        language_model: that took part in decoding; empty for none.

    Raises:
        LowbitError: see :func:`~fairseq_lowbit.evaluation.word_errors.count_errors`.
    """

    def __init__(
        self,
        names: Sequence[str],
        references: Sequence[str],
        speakers: Sequence[str] | None,
        recognizers: Sequence[Recognizer],
        language_model: str = "",
    ) -> None:
        self.names, self.references, self.speakers = names, references, speakers
        self.recognizers, self.language_model = recognizers, language_model
        self._errors = [count_errors(references, one.transcripts) for one in recognizers]
        self.words = sum(errors.words for errors in self._errors[0])
        self.rows = [
            self._row(recognizer, errors, self._errors[0] if index else None)
            for index, (recognizer, errors) in enumerate(
                zip(recognizers, self._errors, strict=True)
            )
        ]

    def _row(
        self,
        recognizer: Recognizer,
        errors: list[UtteranceErrors],
        first: list[UtteranceErrors] | None,
    ) -> Row:
        compared = first is not None
        return Row(
            recognizer.name,
            recognizer.precision,
            recognizer.storage_mb,
            word_error_rate(errors, self.speakers),
            character_error_rate(errors, self.speakers),
            sum(e.substitutions for e in errors),
            sum(e.deletions for e in errors),
            sum(e.insertions for e in errors),
            word_error_difference(errors, first, self.speakers) if compared else None,
            matched_pairs(errors, first) if compared else None,
        )

    def findings(self) -> list[str]:
        """Sentences on what the table shows and what it does not."""
        first, *others = self.rows
        notes = []
        if first.wer.value > INFORMATIVE:
            notes.append(
                f"UNINFORMATIVE: {first.name} gets {first.wer.value:.0%} of the words wrong; from "
                f"{INFORMATIVE:.0%} down this table would tell models apart."
            )
        for row in others:
            gap, pairs = row.difference, row.pairs
            verdict = "beyond" if gap.excludes_zero else "NOT beyond"
            caution = ", too few for more than a rough p" if pairs.is_rough else ""
            notes.append(
                f"{row.name}: {100 * gap.value:+.1f} points to {first.name} "
                f"({gap.level:.0%}: {100 * gap.low:+.1f} to {100 * gap.high:+.1f}), {verdict} "
                f"chance; MAPSSWE p {pairs.p_text} in {pairs.segments} segments{caution}."
            )
        return notes

    def write(self, folder: Path) -> None:
        """:data:`WORD_ERRORS_FILE`, :data:`REFERENCES_FILE` and the transcripts of each system, a
        line for each utterance, as they can be read again."""
        folder.mkdir(parents=True, exist_ok=True)
        texts = {REFERENCES_FILE: self.references}
        texts |= {transcript_file(one.name): one.transcripts for one in self.recognizers}
        for file_name, lines in texts.items():
            with atomic_write(folder / file_name) as file:
                file.writelines(f"{line}\n" for line in lines)
        with atomic_write(folder / WORD_ERRORS_FILE) as file:
            json.dump(self._as_json(), file, indent=1)

    def _as_json(self) -> dict:
        counts = {
            one.name: [[e.substitutions, e.deletions, e.insertions] for e in errors]
            for one, errors in zip(self.recognizers, self._errors, strict=True)
        }
        return {
            "words": self.words,
            "language_model": self.language_model,
            "rows": [asdict(row) for row in self.rows],
            "findings": self.findings(),
            "utterances": {
                "names": list(self.names),
                "speakers": None if self.speakers is None else list(self.speakers),
                "words": [errors.words for errors in self._errors[0]],
                "substitutions_deletions_insertions": counts,
            },
        }


def transcript_file(name: str) -> str:
    """The file name of a system's transcripts."""
    return re.sub(r"[^\w.-]+", "_", name) + ".txt"


def check_names(names: Sequence[str]) -> None:
    """Raises LowbitError for two systems of one name, or whose transcripts would be one file."""
    files = [REFERENCES_FILE, *map(transcript_file, names)]
    for index, name in enumerate(names, start=1):
        if files[index] in files[:index]:
            raise LowbitError(f"the name {name!r} is taken: give each system another one")
