"""The charts as PNG files, drawn by matplotlib, which only the extra `plots` installs."""

from __future__ import annotations

import io
import os
from collections.abc import Sequence
from typing import Any

from vmm.core.errors import UsageError
from vmm.core.output import Output
from vmm.core.ranges import Range
from vmm.trace.arrays import np
from vmm.trace.reader import Trace
from vmm.trace.states import STATES, bytes_over_time, initial_states, state_rows
from vmm.trace.summary import duration_ns
from vmm.trace.views import charts
from vmm.trace.views.tables import Summary

_COLOURS = {"private": "#dde3ee", "shared": "#0d9488", "deferred": "#8b5cf6"}
_LINES = ("#2563eb", "#ea580c")
_MIB = 1 << 20


def prepare(folder: str) -> Any:
    """Import matplotlib's pyplot, which is returned, and make the folder. Raises UsageError."""
    try:
        import matplotlib as mpl

        mpl.use("Agg")
        from matplotlib import pyplot
    except ImportError:
        raise UsageError(
            "--plots needs matplotlib, which is not installed; pip install 'pyvmm[plots]'"
        ) from None
    try:
        os.makedirs(folder, exist_ok=True)
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else str(error)
        raise UsageError(
            f"--plots {folder} cannot be made: {reason}; give another folder"
        ) from None
    return pyplot


def write_plots(folder: str, traces: Sequence[Trace], summaries: Sequence[Summary]) -> None:
    """states.png, shared.png, latency.png and io.png. Raises UsageError, OutputError."""
    pyplot = prepare(folder)
    drawings = {"states": _states, "shared": _shared, "latency": _latency, "io": _io}
    for name, draw in drawings.items():
        path = os.path.join(folder, f"{name}.png")
        output, picture = Output(f"--plots {path}", path), io.BytesIO()
        figure = draw(pyplot, traces, summaries)
        try:
            figure.savefig(picture, dpi=120)
        finally:
            pyplot.close(figure)
        output.write(picture.getvalue())
        output.close()


def _name(trace: Trace) -> str:
    return os.path.basename(os.path.normpath(trace.path))


def _states(pyplot: Any, traces: Sequence[Trace], summaries: Sequence[Summary]) -> Any:
    """Address over time, one picture below the other."""
    from matplotlib.collections import PolyCollection
    from matplotlib.patches import Patch

    figure, all_axes = pyplot.subplots(
        len(traces), figsize=(11, 5 * len(traces)), squeeze=False, layout="constrained"
    )
    for axes, trace, summary in zip(all_axes.flat, traces, summaries, strict=True):
        until = duration_ns(trace)
        found = charts.rectangles(state_rows(trace), initial_states(trace), until)
        left, right = found.start / 1e9, found.end / 1e9
        bottom = found.first * (found.block_bytes / _MIB)
        top = bottom + found.blocks * (found.block_bytes / _MIB)
        corners = np.stack(
            [np.stack(pair, axis=-1) for pair in
             ((left, bottom), (right, bottom), (right, top), (left, top))], axis=1,
        )  # fmt: skip
        for state, colour in _COLOURS.items():
            mine = corners[found.state == STATES.index(state)]
            # A line around it, so that a single page can be seen.
            axes.add_collection(PolyCollection(mine, facecolor=colour, edgecolor=colour, lw=0.6))
        axes.set(xlim=(0, until / 1e9), ylim=_address_limits(trace), ylabel="address, MiB")
        axes.set(xlabel="seconds", title=f"Page states, {_name(trace)}")
        patches = [Patch(color=colour, label=state) for state, colour in _COLOURS.items()]
        if summary["bounce_buffer"] is not None:
            area = Range(summary["bounce_buffer"]["gpa"], summary["bounce_buffer"]["bytes"])
            axes.axhspan(area.start / _MIB, area.end / _MIB, fill=False, ec="#be185d", ls="--")
            patches.append(Patch(fill=False, ec="#be185d", ls="--", label="swiotlb, inferred"))
        axes.legend(handles=patches, loc="upper right")
    return figure


def _address_limits(trace: Trace) -> tuple[float, float]:
    ranges = charts.ram_ranges(trace)
    return 0, max((gpa + size for gpa, size in ranges), default=_MIB) / _MIB


def _shared(pyplot: Any, traces: Sequence[Trace], summaries: Sequence[Summary]) -> Any:
    figure, axes = pyplot.subplots(figsize=(9, 4), layout="constrained")
    for trace, colour in zip(traces, _LINES, strict=False):
        until = duration_ns(trace)
        times, values = charts.points(
            bytes_over_time(state_rows(trace), initial_states(trace)), until
        )
        axes.step(
            [*(at / 1e9 for at in times), until / 1e9],
            [value / _MIB for value in [*values, values[-1]]],
            where="post", color=colour, label=_name(trace),
        )  # fmt: skip
    axes.set(xlabel="seconds", ylabel="MiB shared", title="Bytes shared over time")
    axes.set_ylim(bottom=0)
    axes.legend()
    return figure


def _latency(pyplot: Any, traces: Sequence[Trace], summaries: Sequence[Summary]) -> Any:
    figure, axes = pyplot.subplots(figsize=(9, 4), layout="constrained")
    for trace, colour in zip(traces, _LINES, strict=False):
        found = charts.latency_histogram(trace)
        for kind, style in (("share", "-"), ("unshare", "--")):
            if found["edges"]:
                edges = [edge / 1000 for edge in found["edges"]]
                label = f"{_name(trace)}: {kind}"
                axes.stairs(found[kind], edges, color=colour, ls=style, label=label)
    axes.set(xscale="log", xlabel="microseconds", ylabel="requests", title="Conversion latency")
    if axes.has_data():
        axes.legend()
    return figure


def _io(pyplot: Any, traces: Sequence[Trace], summaries: Sequence[Summary]) -> Any:
    """MiB in each time slice: to the guest above the line, from it below."""
    figure, axes = pyplot.subplots(figsize=(9, 4), layout="constrained")
    for trace, colour in zip(traces, _LINES, strict=False):
        until = duration_ns(trace)
        for number, (device, moved) in enumerate(charts.io_over_time(trace, until).items()):
            for direction, sign in (("to_guest", 1), ("from_guest", -1)):
                heights = np.array(moved[direction]) * (sign / _MIB)
                edges = np.linspace(0, until / 1e9, len(heights) + 1)
                label = f"{_name(trace)}: {device}" if sign == 1 else None
                style = ("-", "--", ":")[number % 3]
                axes.stairs(heights, edges, color=colour, ls=style, label=label)
    axes.axhline(0, color="grey", lw=0.5)
    axes.set(xlabel="seconds", ylabel="MiB per slice: to / from the guest", title="I/O")
    if axes.get_legend_handles_labels()[1]:
        axes.legend()
    return figure
