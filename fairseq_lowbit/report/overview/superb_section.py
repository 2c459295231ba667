"""Results of SUPERB, beside published ones."""

from fairseq_lowbit.report.page.page import Section
from fairseq_lowbit.runs.superb.table import SuperbTable


def superb_section(table: SuperbTable) -> Section:
    """The paper's table as a section of the page."""
    rows = [
        (f"{row.name}{suffix}", *map(row.cell, table.columns))
        for rows, suffix in ((table.own, ""), (table.published, " (published)"))
        for row in rows
    ]
    heads = ("model", *(column.head for column in table.columns))
    return Section("superb", "SUPERB", heads=heads, rows=rows, legend=table.notes)
