"""Letters and sentencepiece pieces as the units of a recognizer."""

from pathlib import Path

import pytest
import sentencepiece

from fairseq_lowbit.data.units import (
    Letters,
    Pieces,
    collapsed,
    decode,
    encode_lines,
    fewest_frames,
    read_units,
)
from fairseq_lowbit.errors import LowbitError

TEXTS = ["in the beginning", "the earth was void", "and there was light"]


@pytest.fixture(scope="module")
def pieces(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pieces")
    (folder / "text").write_text("\n".join(TEXTS))
    sentencepiece.SentencePieceTrainer.train(
        input=str(folder / "text"),
        model_prefix=str(folder / "spm"),
        vocab_size=21,
        minloglevel=2,
    )
    return folder / "spm.model"


def test_letters_come_back_as_text() -> None:
    units = Letters.of(TEXTS)
    assert units.vocabulary[:2] == ("", "|")
    assert "".join(units.vocabulary[2:]) == "abdeghilnorstvw"
    ids = units.encode("the light")
    assert 0 not in ids
    assert decode(ids, units.vocabulary) == "the light"


def test_pieces_come_back_as_text(pieces: Path) -> None:
    units = Pieces(pieces)
    assert units.vocabulary[0] == ""
    assert not {"<unk>", "<s>", "</s>"} & set(units.vocabulary)
    for text in TEXTS:
        ids = units.encode(text)
        assert set(ids) <= set(range(1, len(units.vocabulary)))
        assert decode(ids, units.vocabulary) == text


def test_what_frames_stand_for() -> None:
    assert collapsed([0, 3, 3, 0, 3, 4, 4, 0, 0]) == [3, 3, 4]
    assert fewest_frames([3, 3, 4]) == 4
    assert fewest_frames([]) == 0


def test_a_character_outside_the_vocabulary_is_named(pieces: Path) -> None:
    for units in (Letters.of(TEXTS), Pieces(pieces)):
        with pytest.raises(LowbitError, match=r"valid\.wrd:2: the character 'Z'"):
            encode_lines(units, ["the", "the Zoo"], Path("valid.wrd"))


def test_units_that_are_none(tmp_path: Path) -> None:
    with pytest.raises(LowbitError, match=r"there is no sentencepiece model .*spm; want letters"):
        read_units(str(tmp_path / "spm"), TEXTS)
    (tmp_path / "spm").write_text("words")
    with pytest.raises(LowbitError, match="spm is no sentencepiece model"):
        read_units(str(tmp_path / "spm"), TEXTS)
    with pytest.raises(LowbitError, match="space between words"):
        read_units("letters", ["a|b"])
