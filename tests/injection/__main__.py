"""`python -m tests.injection`: the table of calls and errors as Markdown."""

from __future__ import annotations

from tests.injection.table import as_markdown

print(as_markdown(), end="")
