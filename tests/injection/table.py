"""Calls of the host's that a run makes, the errors that they can give, and what comes of each.

One place: the tests are made of it, and `python -m tests.injection` prints it.
"""

from __future__ import annotations

import errno

from tests.injection.injecting import SHORT
from tests.injection.row import COLUMNS, NOT_GIVEN, Row
from tests.injection.rows_asked import APART, ASKED
from tests.injection.rows_running import CONVERSION, DISK, OTHERS, RUN
from tests.injection.rows_start import END, START

TABLE: list[Row] = [*DISK, *CONVERSION, *RUN, *START, *END, *OTHERS, *APART, *ASKED]


def word(error: int) -> str:
    """The errno's name."""
    if error == errno.EOPNOTSUPP:
        return "EOPNOTSUPP"  # Python has the other name
    return "short count" if error == SHORT else errno.errorcode[error]


def as_markdown() -> str:
    """The table: a row for each call and object, a column for each error."""
    others = sorted({error for row in TABLE for error in row.cells} - set(COLUMNS))
    errors = [error for error in (*COLUMNS, *others) if any(error in row.cells for row in TABLE)]
    # Rare ones share a column: else most of the table would be empty.
    rare = [error for error in errors if sum(error in row.cells for row in TABLE) < 16]
    errors = [error for error in errors if error not in rare]
    head = ["path", "call", "on", *map(word, errors), "others"]
    lines = [f"| {' | '.join(head)} |", f"|{'---|' * len(head)}"]
    for row in TABLE:
        more = "; ".join(
            f"{word(error)}: {row.cells[error]}" for error in rare if error in row.cells
        )
        cells = [row.cells.get(error, NOT_GIVEN) for error in errors]
        lines.append(f"| {' | '.join([row.path, f'`{row.call}`', row.on, *cells, more])} |")
    return "\n".join(lines) + "\n"
