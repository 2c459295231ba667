"""What is compared, as plain data: a method at every width is a row. A line of METHODS adds one."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from importlib.util import find_spec

from fairseq_lowbit.errors import LowbitError

OURS, TORCHAO, BREVITAS, FLOAT = "fairseq_lowbit", "torchao", "brevitas", "float"
PEERS = (TORCHAO, BREVITAS)
WIDTHS = ((8, 8), (4, 4), (2, 2), (1, 1))


@dataclass(frozen=True)
class Method:
    """A way to quantize the encoder's linears.

    Attributes:
        name: rows are called ``<name>_w4a4``.
        title: in the table.
        library: whose quantization it is.
        family: of ours, what the precision's name begins with: ``bitl`` gives ``bitl_w4a4``.
        overrides: of ours, settings of a training that it differs by, such as ``rules=stretched``.
        widths: bits of weights and of inputs.
    """

    name: str
    title: str
    library: str = OURS
    family: str = "bitl"
    overrides: tuple[str, ...] = ()
    widths: tuple[tuple[int, int], ...] = WIDTHS


@dataclass(frozen=True)
class Row:
    """A method at one width; the float student has 16 bits, see students.py.

    Attributes:
        precision: of ours, its name.
    """

    name: str
    title: str
    library: str
    weight_bits: int
    activation_bits: int
    precision: str = "float"
    overrides: tuple[str, ...] = ()

    @property
    def bits(self) -> str:
        if self.library == FLOAT:
            return "float"
        return f"W{self.weight_bits}A{self.activation_bits}"


METHODS = (
    Method("ours", "BiT-L"),
    Method("minmax", "min-max", family="minmax"),
    Method("torchao", "torchao QAT", TORCHAO),
    Method("brevitas", "Brevitas QAT", BREVITAS),
)


def _rows() -> Iterator[Row]:
    yield Row("float", "float, from 8-bit weights", FLOAT, 16, 16)
    for method in METHODS:
        for weights, inputs in method.widths:
            width = f"w{weights}a{inputs}"
            yield Row(
                f"{method.name}_{width}",
                method.title,
                method.library,
                weights,
                inputs,
                f"{method.family}_{width}",
                method.overrides,
            )


ROWS = {row.name: row for row in _rows()}


def chosen_rows(patterns: Sequence[str]) -> list[Row]:
    """The rows of these names, in which ``*`` stands for anything, in the order of the table.

    Raises:
        LowbitError: a name that no row has; a row of a library that is not installed.
    """
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in ROWS):
            raise LowbitError(f"--rows {pattern}: choose among {', '.join(ROWS)}, or ours_* and so")
    rows = [
        row for row in ROWS.values() if any(fnmatchcase(row.name, pattern) for pattern in patterns)
    ]
    for row in rows:
        if row.library in PEERS and find_spec(row.library) is None:
            raise LowbitError(
                f"row {row.name} needs {row.library}: pip install 'fairseq-lowbit[bench]', or "
                "choose rows without it, such as --rows float 'ours_*' 'minmax_*'"
            )
    return rows
