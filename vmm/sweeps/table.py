"""A sweep's results as text, 80 columns wide."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from vmm.core.errors import one_line
from vmm.sweeps.results import EXPOSED, REFUSED, WAITED, Group, Results, Spread
from vmm.trace.views.units import bytes_text, count_text, time_text

WIDTH = 80
_SHOWN_FAILURES = 5
_COLUMNS = ((13, "exposed"), (13, "guest waits"), (9, "refused"), (5, "runs"))
_LABEL = WIDTH - 2 - sum(width + 1 for width, _ in _COLUMNS)


def lines(results: Results, store: str) -> list[str]:
    """The table, the failures, and what the marks mean."""
    groups = results.groups()
    made = []
    for workload in dict.fromkeys(group.workload_label for group in groups):
        mine = [group for group in groups if group.workload_label == workload]
        made += [_cut(one_line(workload), WIDTH), _head()]
        made += [line for group in mine for line in _row(group)]
        made.append("")
    if any(group.on_front for group in groups):
        made.append("* on the Pareto front: none that grants everything exposes less without")
        made.append("  keeping the guest waiting longer.")
    if any(group.ended for group in groups):
        made.append("! the guest's run ended early; --json says why.")
    made += _failures(results)
    if results.missing:
        made.append(f"{count_text(results.missing)} cells have not been run.")
    made.append(f"Results are in {one_line(store)}.")
    return made


def _head() -> str:
    cells = " ".join(name.rjust(width) for width, name in _COLUMNS)
    return f"  {'policy'.ljust(_LABEL)} {cells}"


def _row(group: Group) -> Iterator[str]:
    mark = "*" if group.on_front else "!" if group.ended else " "
    runs = str(group.cells - group.failed - group.missing)
    if group.figures:
        figures = group.figures
        texts = [
            _spread_text(figures[EXPOSED], bytes_text),
            _spread_text(figures[WAITED], time_text),
            count_text(figures[REFUSED].mean) if figures[REFUSED].mean else "-",
            runs,
        ]
    else:
        texts = ["failed" if group.failed else "-", "-", "-", runs]
    cells = " ".join(text.rjust(width) for text, (width, _) in zip(texts, _COLUMNS, strict=True))
    label = one_line(group.policy_label)
    if len(label) > _LABEL:
        yield f"{mark} {_cut(label, WIDTH - 2)}"
        mark, label = " ", ""
    yield f"{mark} {label.ljust(_LABEL)} {cells}"


def _spread_text(spread: Spread, show: Callable[[float], str]) -> str:
    text = show(spread.mean)
    if spread.deviation and spread.mean:
        text += f" {100 * spread.deviation / spread.mean:.0f}%"
    return text


def _cut(text: str, width: int) -> str:
    return text if len(text) <= width else f"{text[: width - 3]}..."


def _failures(results: Results) -> Iterator[str]:
    failed = results.failed
    if not failed:
        return
    yield f"{count_text(len(failed))} cells failed; --retry-failed runs them again."
    reasons: dict[tuple[str, str], int] = {}
    for each in failed:
        assert each.result is not None
        at = (each.policy_label, each.result.error or "")
        reasons[at] = reasons.get(at, 0) + 1
    for (policy, error), number in list(reasons.items())[:_SHOWN_FAILURES]:
        yield _cut(one_line(f"  {number} x {policy}: {error}"), WIDTH)
    if len(reasons) > _SHOWN_FAILURES:
        yield f"  ... (--json has all {len(reasons)} kinds, with their logs)"
    else:
        yield "  --json has their logs."
