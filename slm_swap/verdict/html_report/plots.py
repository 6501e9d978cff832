"""The report's plots: each function draws one figure; `svgs` gives it for wide and narrow screens, in light and dark, as SVG.

Numbers come as the decision has them, 0..1; the plots show points. Sizes are CSS pixels. The same input gives the same bytes.
"""

import io
from base64 import b64encode
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from slm_swap.verdict.html_report.text import one_line
from slm_swap.verdict.html_report.words import range_of, short, signed


class Theme(NamedTuple):
    """Colours with a contrast of at least 4.5 (text) and 3 (marks) on the page, which colour-blind readers can tell apart."""

    paper: str
    text: str
    muted: str
    grid: str
    azure: str
    slm: str
    fine: str


THEMES = {
    "light": Theme("#ffffff", "#1c1d1f", "#5a5e64", "#dcdee1", "#0a62a8", "#b34700", "#e8eef0"),
    "dark": Theme("#15171a", "#e7e8ea", "#a6abb3", "#373b42", "#74b9f5", "#f2a65a", "#20282c"),
}
WIDTHS = {"wide": 720, "narrow": 340}
FONT = 13.0
AXIS = 44  # the height below the plot
BAND = 0.5  # the share of a line's height that belongs to its marks where the name stands above them
SETTINGS = {
    "svg.fonttype": "none",  # text stays text: small, and in the reader's own font
    "svg.hashsalt": "slm_swap",
    "font.size": FONT,
    "axes.linewidth": 1,
    "axes.spines.left": False,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.unicode_minus": True,
    "text.parse_math": False,  # a `$` in a label is a dollar
}
MEASURED_FONT, SHOWN_FONT = "'DejaVu Sans'", "system-ui, -apple-system, 'Segoe UI', Roboto, 'DejaVu Sans', sans-serif"


class Picture(NamedTuple):
    """One figure for one theme and width: a data: address and its size."""

    address: str
    width: int
    height: int


Draw = Callable[["Canvas"], None]


def svgs(draw: Draw) -> dict[str, Picture]:
    """A figure as `wide_light`, `wide_dark`, `narrow_light` and `narrow_dark`."""
    return {f"{width}_{theme}": Canvas(WIDTHS[width], THEMES[theme]).picture(draw) for width in WIDTHS for theme in THEMES}


class Canvas:
    """One figure of a given width; its height follows from what is drawn."""

    def __init__(self, width: int, theme: Theme):
        self.width, self.theme = width, theme
        self.narrow = width < 500

    def picture(self, draw: Draw) -> Picture:
        import matplotlib
        from matplotlib.backends.backend_svg import FigureCanvasSVG
        from matplotlib.figure import Figure

        with matplotlib.rc_context():
            matplotlib.rcdefaults()  # not the reader's own settings: the same bytes everywhere
            matplotlib.rcParams.update(SETTINGS)
            self.figure = Figure(dpi=72)  # one point is one pixel
            FigureCanvasSVG(self.figure)
            self.figure.patch.set_alpha(0)
            draw(self)
            stream = io.StringIO()
            self.figure.savefig(stream, format="svg", metadata={"Date": None, "Creator": None})
        svg = stream.getvalue().replace(MEASURED_FONT, SHOWN_FONT)
        address = "data:image/svg+xml;base64," + b64encode(svg.encode()).decode()
        return Picture(address, self.width, round(self.figure.get_figheight() * 72))

    def axes(self, height: float, left: float, right: float, legend: Sequence[str] = ()):
        """The figure's only axes, `height` high, with room around them; `legend` are the texts that `legend` will show above."""
        self.columns = min(3, len(legend)) if sum(map(len, legend)) < (28 if self.narrow else 90) else 1
        top = 10 + (22 * -(-len(legend) // self.columns) if legend else 0)
        total = height + top + AXIS
        self.figure.set_size_inches(self.width / 72, total / 72)
        box = (left / self.width, AXIS / total, 1 - (left + right) / self.width, height / total)
        axes = self.figure.add_axes(box, facecolor="none")
        axes.tick_params(colors=self.theme.muted, length=0, pad=7)
        axes.spines["bottom"].set_color(self.theme.grid)
        axes.grid(True, axis="x", color=self.theme.grid, linewidth=1)
        axes.set_axisbelow(True)
        return axes

    def lines(self, names: Sequence[str], values: Sequence[str], legend: Sequence[str] = ()):
        """Axes with one line for each name, from the top: marks are drawn at 0, 1 and so on.

        On a wide screen the names stand to the left and their numbers to the right, on a narrow one both above the marks.
        """
        left, right = (14, 14) if self.narrow else (190, 160)
        axes = self.axes(len(names) * (44 if self.narrow else 36), left, right, legend)
        axes.set_ylim(len(names) - 0.5, -0.75 if self.narrow else -0.5)
        axes.set_yticks([])
        above = -0.42 if self.narrow else 0
        sides = (0, 1) if self.narrow else (-left / (self.width - left - right), 1 + right / (self.width - left - right))
        across = axes.get_yaxis_transform()
        for at, (name, value) in enumerate(zip(names, values, strict=True)):
            text = one_line(name, 21 if self.narrow else 27)
            axes.text(sides[0], at + above, text, transform=across, color=self.theme.text, va="center")
            axes.text(sides[1], at + above, value, transform=across, color=self.theme.muted, va="center", ha="right")
        return axes

    def x_label(self, axes, text: str) -> None:
        axes.set_xlabel(one_line(text, 50), color=self.theme.muted, labelpad=6)

    def legend(self, axes, handles: Sequence[Any], labels: Sequence[str]) -> None:
        axes.legend(
            handles, [f" {label}" for label in labels],  # matplotlib leaves out what begins with an underscore
            loc="lower left", bbox_to_anchor=(-0.01, 1.0), ncols=self.columns, frameon=False, borderpad=0.2, handletextpad=0.3,
            columnspacing=1.4, handlelength=1.8, labelspacing=0.35, fontsize=FONT, labelcolor=self.theme.text,
        )  # fmt: skip


# -- Plots -----------------------------------------------------------------------------------------------------------------------


def both_models(names: Sequence[str], metrics: Sequence[dict[str, Any]], labels: Sequence[str]) -> Draw:
    """Each metric of both models, in per cent, with its interval where there is one."""

    def draw(canvas: Canvas) -> None:
        theme = canvas.theme
        legend = [one_line(label, 40) for label in labels]
        axes = canvas.lines(names, [f"{100 * metric['azure']:.1f} and {100 * metric['slm']:.1f}" for metric in metrics], legend)
        ends = []
        for side, color, marker, shift in (("azure", theme.azure, "o", -0.13), ("slm", theme.slm, "s", 0.13)):
            points = [(metric[side], metric[f"{side}_interval"]) for metric in metrics]
            ends += dots(axes, points, shift, color, marker)
        axes.set_xlim(*room(min(ends), max(ends), 0, 100))
        canvas.x_label(axes, "points out of 100")
        canvas.legend(axes, [mark(theme.azure, "o"), mark(theme.slm, "s")], legend)

    return draw


def behind(
    names: Sequence[str],
    differences: Sequence[float],
    intervals: Sequence[list[float] | None],
    delta: float | None,
    x_label: str,
    measured: Sequence[float] = (),
) -> Draw:
    """How far the small model is behind on each line, in points, with intervals; with `delta`, the margin that is good enough; hollow,
    what was `measured` where `differences` are estimates."""

    def draw(canvas: Canvas) -> None:
        from matplotlib.lines import Line2D
        from matplotlib.patches import Patch

        theme = canvas.theme
        legend = [] if delta is None else [f"margin: {100 * delta:g} points", "good enough"]
        axes = canvas.lines(names, [range_of(*pair) for pair in zip(differences, intervals, strict=True)], legend)
        ends = [*dots(axes, list(zip(differences, intervals, strict=True)), 0, theme.slm, "s"), 0, 100 * (delta or 0)]
        axes.plot([100 * value for value in measured], range(len(measured)), color=theme.slm, linestyle="none", marker="o", fillstyle="none")
        ends += [100 * value for value in measured]
        limits = room(min(ends), max(ends), -100, 100)
        upright(canvas, axes, len(names), 0, color=theme.muted, linewidth=1)
        if delta is not None:
            dashes = {"color": theme.text, "linewidth": 1.5, "linestyle": (0, (4, 3))}
            upright(canvas, axes, len(names), 100 * delta, **dashes)
            height = BAND if canvas.narrow else len(names)
            axes.barh(range(len(names)), 100 * delta - limits[0], height, limits[0], color=theme.fine, zorder=0, linewidth=0)
            canvas.legend(axes, [Line2D([], [], **dashes), Patch(color=theme.fine)], legend)
        axes.set_xlim(*limits)
        canvas.x_label(axes, x_label)

    return draw


def error_bars(names: Sequence[str], errors: Sequence[dict[str, Any]]) -> Draw:
    """How much each kind of error adds to the gap, in points."""

    def draw(canvas: Canvas) -> None:
        theme = canvas.theme
        axes = canvas.lines(names, [signed(error["difference"]) for error in errors])
        values = [100 * error["difference"] for error in errors]
        colors = [theme.slm if value > 0 else theme.azure for value in values]
        faces = [theme.slm if value > 0 else "none" for value in values]  # hollow where the small model is better
        axes.barh(range(len(values)), values, height=0.3, color=faces, edgecolor=colors, linewidth=1.5)
        upright(canvas, axes, len(names), 0, color=theme.muted, linewidth=1)
        axes.set_xlim(*room(min(0, *values), max(0, *values), -100, 100))
        canvas.x_label(axes, "points of the gap")

    return draw


def before_after(names: Sequence[str], metrics: Sequence[dict[str, Any]], azure: Sequence[float], labels: Sequence[str]) -> Draw:
    """Each metric before and after fine-tuning, and where the hosted model stands."""

    def draw(canvas: Canvas) -> None:
        theme = canvas.theme
        legend = ["before", "after", one_line(labels[0], 40)]
        axes = canvas.lines(names, [f"{100 * m['before']:.1f} → {100 * m['slm']:.1f}" for m in metrics], legend)
        ats = range(len(names))
        values = [[100 * metric[side] for metric in metrics] for side in ("before", "slm")]
        hosted = [100 * target for target in azure]
        ends = [*values[0], *values[1], *hosted]
        axes.hlines(ats, *values, color=theme.slm, linewidth=2)
        style = {"color": theme.slm, "linestyle": "none", "marker": "s", "markersize": 8}
        axes.plot(values[0], ats, markerfacecolor=theme.paper, markeredgewidth=2, **style)
        axes.plot(values[1], ats, **style)
        axes.plot(hosted, ats, color=theme.azure, linestyle="none", marker="|", markersize=16, markeredgewidth=2.5)
        axes.set_xlim(*room(min(ends), max(ends), 0, 100))
        canvas.x_label(axes, "points out of 100")
        canvas.legend(axes, [mark(theme.slm, "s", theme.paper), mark(theme.slm, "s"), mark(theme.azure, "|")], legend)

    return draw


def cost_steps(
    curve: Sequence[dict[str, Any]],
    shaded: Sequence[tuple[int, int]],
    volume: int | None,
    labels: Sequence[str],
    axis_labels: tuple[str, str],
) -> Draw:
    """Both bills over the tasks a month, through the points of `curve`; `shaded` are the ranges in which the small model is cheaper."""

    def draw(canvas: Canvas) -> None:
        from matplotlib.lines import Line2D
        from matplotlib.patches import Patch
        from matplotlib.ticker import FuncFormatter, MaxNLocator

        theme = canvas.theme
        legend = [*(one_line(label, 40) for label in labels), *(["small model is cheaper"] if shaded else [])]
        axes = canvas.axes(240, left=58, right=20, legend=legend)
        axes.grid(True, color=theme.grid, linewidth=1)
        styles = [
            {"color": theme.azure, "linewidth": 2.5, "linestyle": "-"},
            {"color": theme.slm, "linewidth": 2.5, "linestyle": (0, (6, 2))},
        ]
        tasks = [at["tasks"] for at in curve]
        for side, style in zip(("azure", "slm"), styles, strict=True):
            axes.plot(tasks, [at[side] for at in curve], **style)
        for first, last in shaded:
            axes.axvspan(first, last, color=theme.fine, zorder=0, linewidth=0)
        if volume is not None:
            axes.axvline(volume, color=theme.muted, linewidth=1.5, linestyle=(0, (1, 2)))
        axes.set_xlim(0, tasks[-1])
        axes.set_ylim(0, 1.08 * max(max(at["azure"], at["slm"]) for at in curve) or 1)
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_locator(MaxNLocator(4 if canvas.narrow else 6))
            axis.set_major_formatter(FuncFormatter(lambda value, _: short(value)))
        axes.set_ylabel(axis_labels[1], color=theme.muted)
        canvas.x_label(axes, axis_labels[0])
        handles = [Line2D([], [], **style) for style in styles] + ([Patch(color=theme.fine)] if shaded else [])
        canvas.legend(axes, handles, legend)

    return draw


def risk_coverage(names: Sequence[str], curves: Sequence[Sequence[tuple[float, float]]]) -> Draw:
    """The share of wrong replies among those that are answered, over the share that is answered: one line for each signal."""

    def draw(canvas: Canvas) -> None:
        from matplotlib.lines import Line2D
        from matplotlib.ticker import MaxNLocator

        theme = canvas.theme
        legend = [one_line(name, 40) for name in names]
        axes = canvas.axes(240, left=58, right=20, legend=legend)
        axes.grid(True, color=theme.grid, linewidth=1)
        dashes, colors = ["-", (0, (6, 2)), (0, (1, 2))], (theme.slm, theme.azure, theme.text, theme.muted)
        # Neither colour nor dash comes twice in a row, and no pair of them twice among twelve.
        styles = [{"color": colors[at % 4], "linewidth": 2, "linestyle": dashes[at % 3]} for at in range(len(names))]
        for curve, style in zip(curves, styles, strict=True):
            marker = "o" if len(curve) < 3 else None  # a signal of yes and no has hardly a line
            axes.plot([100 * coverage for coverage, _ in curve], [100 * risk for _, risk in curve], marker=marker, markersize=5, **style)
        axes.set_xlim(0, 101)
        axes.set_ylim(0, 1.08 * max(100 * risk for curve in curves for _, risk in curve) or 1)
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_locator(MaxNLocator(4 if canvas.narrow else 6))
        axes.set_ylabel("% of these wrong", color=theme.muted)
        canvas.x_label(axes, "% of rows answered, the surest first")
        canvas.legend(axes, [Line2D([], [], **style) for style in styles], legend)

    return draw


def regret_curves(names: Sequence[str], curves: Sequence[Sequence[Sequence[float]]], delta: float, what: str) -> Draw:
    """The regret over the share that is answered locally, seen and its bound: two lines for each signal, and the target `delta`.

    `curves` are points (share, seen, bound); the plot ends a little above the bound of the last threshold that matters.
    """

    def draw(canvas: Canvas) -> None:
        from matplotlib.lines import Line2D
        from matplotlib.ticker import MaxNLocator

        theme = canvas.theme
        legend = [*(one_line(name, 40) for name in names), "bound", f"target: {100 * delta:g}%"]
        axes = canvas.axes(240, left=58, right=20, legend=legend)
        axes.grid(True, color=theme.grid, linewidth=1)
        colors, dashes = (theme.slm, theme.azure, theme.text, theme.muted), (0, (3, 2))
        for at, curve in enumerate(curves):
            shares = [100 * share for share, _, _ in curve]
            for column, style in ((1, "-"), (2, dashes)):
                line = {"color": colors[at % 4], "linewidth": 2 if column == 1 else 1.5, "linestyle": style}
                axes.plot(shares, [100 * point[column] for point in curve], drawstyle="steps-post", marker="." if len(curve) < 3 else None, **line)
        target = {"color": theme.text, "linewidth": 1.5, "linestyle": (0, (1, 2))}
        axes.axhline(100 * delta, **target)
        axes.set_xlim(0, 101)
        axes.set_ylim(0, min(100, 100 * max(4 * delta, *(curve[0][2] * 1.2 for curve in curves))))
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_locator(MaxNLocator(4 if canvas.narrow else 6))
        axes.set_ylabel(f"{what}, %", color=theme.muted)
        canvas.x_label(axes, "% answered locally, the surest first")
        styles = [{"color": colors[at % 4], "linewidth": 2} for at in range(len(names))] + [{"color": theme.muted, "linestyle": dashes}, target]
        canvas.legend(axes, [Line2D([], [], **style) for style in styles], legend)

    return draw


# -- Parts of plots --------------------------------------------------------------------------------------------------------------


def dots(axes, values: Sequence[tuple[float, list[float] | None]], shift: float, color: str, marker: str) -> list[float]:
    """One mark a line, `shift` below its middle, with its interval where there is one; gives everything's place in points."""
    ats = [at + shift for at in range(len(values))]
    lows, highs = ([100 * (interval[end] if interval else value) for value, interval in values] for end in (0, 1))
    axes.hlines(ats, lows, highs, color=color, linewidth=2)
    axes.plot(lows + highs, ats * 2, color=color, linestyle="none", marker="|", markersize=7, markeredgewidth=2)
    axes.plot([100 * value for value, _ in values], ats, color=color, linestyle="none", marker=marker, markersize=7)
    return lows + highs + [100 * value for value, _ in values]


def room(low: float, high: float, least: float, most: float) -> tuple[float, float]:
    """Limits of an axis: some margin on both sides, hardly beyond what is possible."""
    margin = max(0.3, 0.06 * (high - low))
    return max(low - margin, least - 1.5), min(high + margin, most + 1.5)


def mark(color: str, marker: str, face: str | None = None):
    """A mark of the legend."""
    from matplotlib.lines import Line2D

    style = {"markersize": 8, "markerfacecolor": face or color, "markeredgewidth": 2}
    return Line2D([], [], color=color, marker=marker, linestyle="none", **style)


def upright(canvas: Canvas, axes, lines: int, x: float, **style: Any) -> None:
    """A vertical line; on a narrow screen only beside the marks, as the names stand between them."""
    half = BAND / 2 if canvas.narrow else 0.5
    axes.vlines([x] * lines, [at - half for at in range(lines)], [at + half for at in range(lines)], **style)
