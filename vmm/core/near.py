"""What a misspelt word was meant to be."""

from __future__ import annotations

from collections.abc import Iterable


def did_you_mean(word: str, known: Iterable[str]) -> str | None:
    """ "did you mean ...?" with the known word that is nearest; None where none is near."""
    import difflib  # of a mistake only

    near = difflib.get_close_matches(word, list(known), 1, cutoff=0.7)
    return f"did you mean {near[0]}?" if near else None
