"""The Pareto plots as one SVG file, drawn by matplotlib, which only the extra `plots` installs."""

from __future__ import annotations

import io
from typing import Any

from vmm.core.errors import UsageError
from vmm.core.output import Output
from vmm.sweeps import chart
from vmm.sweeps.results import Results
from vmm.trace.views.units import bytes_text, time_text

_FRONT = "#be185d"


def write_svg(output: Output, results: Results) -> None:
    """One plot for each workload, side by side, two in a row. Raises UsageError, OutputError."""
    try:
        import matplotlib as mpl

        mpl.use("Agg")
        from matplotlib import pyplot
        from matplotlib.lines import Line2D
    except ImportError:
        raise UsageError(
            "--svg needs matplotlib, which is not installed; pip install 'pyvmm[plots]'"
        ) from None
    groups = results.groups()
    colours = chart.colours(groups)
    workloads = list(dict.fromkeys(group.workload_label for group in groups))
    columns = min(len(workloads), 2)
    rows = -(-len(workloads) // columns)
    # The same sweep makes the same file, whose text stays text.
    settings: Any = {"svg.hashsalt": "pyvmm", "svg.fonttype": "none", "font.size": 9}
    with mpl.rc_context(settings):
        figure, all_axes = pyplot.subplots(
            rows, columns, figsize=(5.2 * columns, 4 * rows), squeeze=False, layout="constrained"
        )
        try:
            for axes in list(all_axes.flat)[len(workloads) :]:
                axes.set_axis_off()
            for axes, workload in zip(all_axes.flat, workloads, strict=False):
                mine = [group for group in groups if group.workload_label == workload]
                _draw(axes, workload, chart.points(mine), colours)
            handles = [
                Line2D([], [], marker="o", linestyle="", color=colour, label=name)
                for name, colour in colours.items()
            ]
            handles.append(
                Line2D(
                    [],
                    [],
                    color=_FRONT,
                    marker="o",
                    markersize=10,
                    markerfacecolor="none",
                    label="Pareto front",
                )
            )
            handles.append(
                Line2D(
                    [], [], marker="o", linestyle="", color="gray", markerfacecolor="none",
                    label="refuses requests",
                )
            )  # fmt: skip
            handles.append(Line2D([], [], linestyle=":", color="gray", label="front with those"))
            figure.legend(handles=handles, loc="outside lower center", ncols=4, frameon=False)
            picture = io.BytesIO()
            figure.savefig(picture, format="svg", metadata={"Date": None})
        finally:
            pyplot.close(figure)
    output.write(picture.getvalue())


def _draw(axes: Any, title: str, drawn: list[chart.Point], colours: dict[str, str]) -> None:
    axes.set_title(title)
    axes.set_xlabel("the guest waits")
    axes.set_ylabel("exposed to the host on average")
    axes.grid(alpha=0.3)
    if not drawn:
        return
    across = chart.axis([point.x_range for point in drawn], 10)
    upwards = chart.axis([point.y_range for point in drawn], 2)
    for axis, found, show in (
        (axes.xaxis, across, time_text),
        (axes.yaxis, upwards, bytes_text),
    ):
        if found.is_log:
            (axes.set_xscale if axis is axes.xaxis else axes.set_yscale)("log")
        axis.set_major_locator(_fixed(found.ticks))
        axis.set_minor_locator(_fixed([]))
        axis.set_major_formatter(lambda value, _, show=show: show(value))
    for of_all, style, colour in ((True, ":", "gray"), (False, "-", _FRONT)):
        corners = chart.front_line(drawn, of_all=of_all)
        if len(corners) > 1:
            axes.plot(*zip(*corners, strict=True), style, color=colour, linewidth=1.3, zorder=1)
    for point in sorted(drawn, key=lambda point: point.group.on_front):  # these on top
        colour = colours[point.group.policy]
        axes.errorbar(
            point.x, point.y,
            xerr=[[point.x - point.x_range[0]], [point.x_range[1] - point.x]],
            yerr=[[point.y - point.y_range[0]], [point.y_range[1] - point.y]],
            marker="o", markersize=6, color=colour, linewidth=1, zorder=2,
            markerfacecolor=colour if point.group.counts else "none",
            markeredgecolor=colour,
        )  # fmt: skip
        if point.group.on_front:
            axes.plot(
                point.x, point.y, marker="o", markersize=12, color=_FRONT, markerfacecolor="none",
                zorder=3,
            )  # fmt: skip
    if not across.is_log:
        axes.set_xlim(left=0)
    if not upwards.is_log:
        axes.set_ylim(bottom=0)


def _fixed(ticks: Any) -> Any:
    from matplotlib.ticker import FixedLocator

    return FixedLocator(ticks)
