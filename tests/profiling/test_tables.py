"""Tables of profiles in a terminal."""

import io

import pytest
from rich.console import Console
from rich.table import Table

from fairseq_lowbit.profiling.tables import measured_table, profile_table

PATH = "/data/users/me/exp/demo_60min/teacher/checkpoints/checkpoint_last.pt"
ENTRY = {
    "seconds": 15.0,
    "threads": 1,
    "time_s": 1.2345,
    "time_min_s": 1.2,
    "time_max_s": 1.5,
    "real_time_factor": 0.3,
    "measured_runtime": 1.2,
    "runtime": 0.124,
    "peak_resident_bytes": 1.2e9,
}
ROW = {
    "name": PATH,
    "seconds": 10,
    "parameters": 92_212_096,
    "storage_bytes": 184.42e6,
    "flops": 105.64e9,
    "quantops": 678.12e9,
    "runtime": 1.0,
    "peak_activation_bytes": 131.1e6,
    "measured": [ENTRY],
}


def columns(table: Table, width: int) -> list[str]:
    """What stands in each column from top to bottom, without the line breaks."""
    printed = io.StringIO()
    Console(file=printed, width=width).print(table)
    lines = [line for line in printed.getvalue().splitlines() if line[:1] in ("│", "┃")]
    rows = [[cell.strip() for cell in line[1:-1].replace("┃", "│").split("│")] for line in lines]
    return ["".join(cells) for cells in zip(*rows, strict=True)]


@pytest.mark.parametrize("width", [80, 150])
def test_long_names_fold_and_nothing_is_cut(width: int) -> None:
    found = [column.replace(" ", "") for column in columns(profile_table([ROW]), width)]
    assert found == [
        f"model{PATH}",
        "parameters92,212,096",
        "storageMB184.42",
        "GFLOPs105.64",
        "QuantOpsGbit678.12",
        "runtime1.000",
        "activationsMB131.1",
    ]
    found = [column.replace(" ", "") for column in columns(measured_table([ROW]), width)]
    assert found == [
        "audios15",
        "threads1",
        f"model{PATH}",
        "timems1,234(1,200to1,500)",
        "real-timefactor0.300",
        "measuredruntime1.200",
        "estimated0.124",
        "peakmemoryMB1,200",
    ]
