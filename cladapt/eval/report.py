"""One HTML file that stands alone: tables, heat maps and curves of an evaluation, no script and no outside resource.

A report is a title and a list of sections; what goes into them is the caller's, how they look is decided here.
"""

import json
import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from typing import Any

from cladapt.errors import DataError
from cladapt.eval.significance import Effect

Cell = str | int | float | Effect | None
ROUNDING = 1e-12
"""What is nearer to 0 is what rounding leaves of a 0, and is shown as one."""


@dataclass(frozen=True)
class Table:
    """Rows of cells under column names; an `Effect` shows its mean and interval, None and NaN a dash."""

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[Cell]]
    note: str = ""

    def __post_init__(self) -> None:
        uneven = [len(row) for row in self.rows if len(row) != len(self.columns)]
        if uneven:
            raise DataError(
                f"table {self.title!r} has a row of {uneven[0]} cells under {len(self.columns)} columns",
                "give every row one cell per column",
            )


@dataclass(frozen=True)
class HeatMap:
    """A matrix shaded from its least to its greatest value; cells whose two labels are equal are framed.

    `struck`: labels of cells, row first, whose value is struck through.
    """

    title: str
    row_labels: Sequence[str | int]
    column_labels: Sequence[str | int]
    values: Sequence[Sequence[float | None]]
    corner: str = ""
    note: str = ""
    struck: Collection[tuple[str | int, str | int]] = ()

    def __post_init__(self) -> None:
        widths = [len(row) for row in self.values]
        if widths != [len(self.column_labels)] * len(self.row_labels):
            raise DataError(
                f"heat map {self.title!r} has rows of {widths} values for {len(self.row_labels)} row labels and "
                f"{len(self.column_labels)} column labels",
                "give one row of values per row label, one value per column label",
            )


@dataclass(frozen=True)
class Series:
    """One line of a chart: `points` has an `Effect`, a plain value or None per label of the x axis."""

    name: str
    points: Sequence[Effect | float | None]


@dataclass(frozen=True)
class Curves:
    """Lines over a shared x axis, with the interval of every `Effect` as a bar."""

    title: str
    x_labels: Sequence[str | int]
    series: Sequence[Series]
    x_name: str = "block"
    y_name: str = ""
    note: str = ""

    def __post_init__(self) -> None:
        for line in self.series:
            if len(line.points) != len(self.x_labels):
                raise DataError(
                    f"curve {line.name!r} of {self.title!r} has {len(line.points)} points for "
                    f"{len(self.x_labels)} labels",
                    "give one point per label, None where there is no value",
                )


@dataclass(frozen=True)
class KeyValues:
    """Named facts, such as provenance; a nested mapping becomes dotted names."""

    title: str
    items: Mapping[str, Any]
    note: str = ""


@dataclass(frozen=True)
class Trace:
    """What changes step by step: each of `lines` holds (x, y) in ascending x; a dotted rule marks each x of `marks`.

    `labels` name the lines where one points at them; `log` scales y by its logarithm, which takes y > 0 alone.
    """

    name: str
    lines: Sequence[Sequence[tuple[float, float]]]
    marks: Mapping[float, str] = field(default_factory=dict)
    labels: Sequence[str] = ()
    log: bool = False

    def __post_init__(self) -> None:
        if self.labels and len(self.labels) != len(self.lines):
            raise DataError(
                f"trace {self.name!r} has {len(self.labels)} labels for {len(self.lines)} lines",
                "give one label per line, or none",
            )
        low = min((y for line in self.lines for _, y in line), default=1.0)
        if self.log and low <= 0:
            raise DataError(
                f"trace {self.name!r} has y={low:g} on a logarithmic scale", "leave out what is not above 0"
            )


@dataclass(frozen=True)
class Traces:
    """Small charts side by side, each with its own scale, over the same kind of x axis."""

    title: str
    traces: Sequence[Trace]
    x_name: str = "step"
    note: str = ""


Section = Table | HeatMap | Curves | Traces | KeyValues


def rows_table(title: str, rows: Sequence[Mapping[str, Any]], note: str = "") -> Table:
    """A table of dicts; an interval stands next to its metric."""
    names = list(dict.fromkeys(column for row in rows for column in row))
    interval = {name: f"{name} 95 %" for name in names}
    ends = {end for end in interval.values() if end in names}
    columns = [c for name in names if name not in ends for c in (name, interval[name]) if c == name or c in ends]
    return Table(title, columns, [[row.get(column) for column in columns] for row in rows], note)


def render_report(title: str, sections: Iterable[Section]) -> str:
    """The report as one HTML document."""
    body = "\n".join(_section(section) for section in sections)
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>{_STYLE}</style>\n</head>\n"
        f"<body>\n<main>\n<h1>{escape(title)}</h1>\n{body}\n</main>\n</body>\n</html>\n"
    )


def _section(section: Section) -> str:
    match section:
        case Table():
            content = _table(section) if section.rows else _EMPTY
        case HeatMap():
            content = _heat_map(section) if len(section.values) and len(section.column_labels) else _EMPTY
        case Curves():
            content = _curves(section)
        case Traces():
            drawn = "".join(_trace(trace, section.x_name) for trace in section.traces if any(trace.lines))
            content = f'<div class="traces">{drawn}</div>' if drawn else _EMPTY
        case KeyValues():
            facts = "".join(f"<dt>{escape(k)}</dt><dd>{escape(v)}</dd>" for k, v in _flatten(section.items))
            content = f"<dl>{facts}</dl>" if facts else _EMPTY
    note = f'<p class="note">{escape(section.note)}</p>' if section.note else ""
    return f"<section>\n<h2>{escape(section.title)}</h2>\n{content}\n{note}</section>"


def _table(table: Table) -> str:
    columns = zip(table.columns, zip(*table.rows, strict=True), strict=True)
    kinds = [(name, "" if any(isinstance(cell, str) for cell in cells) else ' class="n"') for name, cells in columns]
    head = "".join(f'<th scope="col"{kind}>{escape(name)}</th>' for name, kind in kinds)
    rows = "".join(f"<tr>{''.join(map(_cell, row))}</tr>\n" for row in table.rows)
    return f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>\n{rows}</tbody></table></div>'


def _cell(value: Cell) -> str:
    if isinstance(value, str):
        return f"<td>{escape(value)}</td>"
    if isinstance(value, Effect):
        bounds = f"{_number(value.low)}, {_number(value.high)}"
        return f'<td class="n">{_number(value.mean)} <small title="{value.n} users">[{bounds}]</small></td>'
    return f'<td class="n">{_number(value)}</td>'


def _heat_map(heat: HeatMap) -> str:
    finite = [v for row in heat.values for v in row if v is not None and math.isfinite(v)]
    low, spread = min(finite, default=0.0), max(finite, default=0.0) - min(finite, default=0.0)
    head = "".join(f'<th scope="col">{escape(str(label))}</th>' for label in heat.column_labels)
    rows = ""
    for label, values in zip(heat.row_labels, heat.values, strict=True):
        cells = ""
        for column, value in zip(heat.column_labels, values, strict=True):
            framed = " d" if label == column else ""
            shown = f"<s>{_number(value)}</s>" if (label, column) in heat.struck else _number(value)
            shade = ""
            if value is not None and math.isfinite(value):
                strength = 0.06 + 0.54 * ((value - low) / spread if spread > 0 else 0.0)
                shade = f' style="background:rgb(59 130 246 / {strength:.2f})"'
            cells += f'<td class="n{framed}"{shade}>{shown}</td>'
        rows += f'<tr><th scope="row">{escape(str(label))}</th>{cells}</tr>\n'
    corner = f"<th>{escape(heat.corner)}</th>"
    return (
        f'<div class="scroll"><table class="heat"><thead><tr>{corner}{head}</tr></thead>'
        f"<tbody>\n{rows}</tbody></table></div>"
    )


@dataclass(frozen=True)
class _Plot:
    """The box of a plot inside its drawing, and the values at its lower and upper edge."""

    right: int
    bottom: int
    ticks: Sequence[float]
    left: int = 62
    top: int = 14
    log: bool = False

    def y(self, value: float) -> float:
        low, high = self.ticks[0], self.ticks[-1]
        if self.log:
            low, high, value = math.log10(low), math.log10(high), math.log10(value)
        return self.bottom - (self.bottom - self.top) * (value - low) / (high - low)

    def axes(self, x_labels: Iterable[tuple[float, str]], x_name: str) -> list[str]:
        """Rules and labels of the y axis, labels and name of the x axis."""
        shapes = []
        for tick in self.ticks:
            at = f"{self.y(tick):.1f}"
            shapes.append(f'<line opacity="0.15" x1="{self.left}" x2="{self.right}" y1="{at}" y2="{at}"/>')
            shapes.append(f'<text x="{self.left - 8}" y="{self.y(tick) + 4:.1f}" text-anchor="end">{tick:.4g}</text>')
        labels = [(x, 18, label) for x, label in x_labels] + [((self.left + self.right) / 2, 38, x_name)]
        for x, below, label in labels:
            shapes.append(f'<text x="{x:.1f}" y="{self.bottom + below}" text-anchor="middle">{escape(label)}</text>')
        return shapes

    def drawing(self, shapes: Iterable[str], title: str) -> str:
        return (
            f'<svg viewBox="0 0 {self.right + 12} {self.bottom + 46}" fill="none" stroke="currentColor" role="img" '
            f'aria-label="{escape(title)}">{"".join(shapes)}</svg>'
        )


def _curves(chart: Curves) -> str:
    lines = [[_bounds(point) for point in line.points] for line in chart.series]
    drawn = [bound for line in lines for point in line if point for bound in point]
    if not drawn:
        return _EMPTY
    plot, count = _Plot(668, 224, _ticks(min(drawn), max(drawn))), len(chart.x_labels)

    def x(i: int) -> float:
        return plot.left + (plot.right - plot.left) * (i + 0.5) / count

    shapes = plot.axes(((x(i), str(label)) for i, label in enumerate(chart.x_labels)), chart.x_name)
    legend = []
    for s, (series, points) in enumerate(zip(chart.series, lines, strict=True)):
        if not any(points):  # its colour stays free, so that a line has one colour in all charts of a page
            continue
        # lines stand side by side, so that the intervals of one block do not hide each other
        shift = (s - (len(lines) - 1) / 2) * min(7.0, 40.0 / len(lines))
        path, pen_down = "", False
        marks = []
        for i, point in enumerate(points):
            if point is None:
                pen_down = False
                continue
            mean, lower, upper = point
            at = x(i) + shift
            path += f"{'L' if pen_down else 'M'}{at:.1f} {plot.y(mean):.1f}"
            pen_down = True
            span = f" [{_number(lower)}, {_number(upper)}]" if upper > lower else ""
            if span:
                marks.append(f'<path class="bar" d="M{at:.1f} {plot.y(lower):.1f}V{plot.y(upper):.1f}"/>')
            tip = f"{series.name}, {chart.x_name} {chart.x_labels[i]}: {_number(mean)}{span}"
            at_mean = f'cx="{at:.1f}" cy="{plot.y(mean):.1f}"'
            marks.append(f'<circle {at_mean} r="2.6" fill="currentColor"><title>{escape(tip)}</title></circle>')
        colour, dash, hollow = f"c{s % _COLOURS}", "", ""
        if s >= _COLOURS:  # colours repeat, told apart by their dashes
            dash, hollow = ' stroke-dasharray="6 4"', " hollow"
        shapes.append(
            f'<g class="{colour}" stroke="currentColor"><path d="{path}" stroke-width="1.7"{dash}/>{"".join(marks)}</g>'
        )
        legend.append(f'<li class="{colour}{hollow}">{escape(series.name)}</li>')
    drawing = plot.drawing(shapes, f"{chart.title}: {chart.y_name} by {chart.x_name}")
    caption = f'<p class="axis">{escape(chart.y_name)}</p>' if chart.y_name else ""
    return f'{caption}{drawing}<ul class="legend">{"".join(legend)}</ul>'


def _trace(trace: Trace, x_name: str) -> str:
    xs, ys = zip(*(point for line in trace.lines for point in line), strict=True)
    ticks = _decades(min(ys), max(ys)) if trace.log else _ticks(min(ys), max(ys))
    plot = _Plot(468, 150, ticks, log=trace.log)
    first, span = min(xs), max(xs) - min(xs) or 1.0

    def x(value: float) -> float:
        return plot.left + (plot.right - plot.left) * (value - first) / span

    shapes = plot.axes([(x(at), f"{at:.4g}") for at in dict.fromkeys((first, max(xs)))], x_name)
    for at, label in trace.marks.items():
        shapes.append(f'<line class="mark" x1="{x(at):.1f}" x2="{x(at):.1f}" y1="{plot.top}" y2="{plot.bottom}"/>')
        shapes.append(f'<text x="{x(at) + 4:.1f}" y="{plot.top + 8}">{escape(label)}</text>')
    width = 0.8 if trace.labels else 1.4  # lines with labels lie over each other
    for line, label in zip(trace.lines, trace.labels or [""] * len(trace.lines), strict=True):
        if not line:
            continue
        path = "L".join(f"{x(at):.1f} {plot.y(value):.1f}" for at, value in line) + ("Z" if len(line) == 1 else "")
        tip = f"<title>{escape(label)}</title>" if label else ""
        shapes.append(f'<path class="c0" stroke="currentColor" stroke-width="{width}" d="M{path}">{tip}</path>')
    drawing = plot.drawing(shapes, f"{trace.name} by {x_name}")
    return f"<figure><figcaption>{escape(trace.name)}</figcaption>{drawing}</figure>"


def _bounds(point: Effect | float | None) -> tuple[float, float, float] | None:
    if isinstance(point, Effect):
        return point.mean, point.low, point.high
    return None if point is None or not math.isfinite(point) else (point, point, point)


def _ticks(low: float, high: float) -> list[float]:
    """About five round values that enclose [low, high]."""
    spread = high - low or abs(high) or 1.0
    unit = 10.0 ** math.floor(math.log10(spread / 4))
    step = next(unit * factor for factor in (1, 2, 5, 10) if unit * factor >= spread / 4)
    first = math.floor(low / step)
    last = max(math.ceil(high / step), first + 1)
    return [i * step for i in range(first, last + 1)]


def _decades(low: float, high: float) -> list[float]:
    """About five powers of ten that enclose [low, high]."""
    first = math.floor(math.log10(low))
    last = max(math.ceil(math.log10(high)), first + 1)
    step = math.ceil((last - first) / 5)
    return [10.0**i for i in range(first, last + step, step)]


def _number(value: float | None) -> str:
    if value is None or math.isnan(value):
        return "—"
    if isinstance(value, int):
        return str(value)
    if abs(value) < ROUNDING:
        value = 0.0
    return f"{value:.4f}" if value == 0 or 1e-3 <= abs(value) < 1e5 else f"{value:.3g}"


def _flatten(items: Mapping[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    flat: list[tuple[str, str]] = []
    for key, value in items.items():
        if isinstance(value, Mapping):
            flat += _flatten(value, f"{prefix}{key}.")
        else:
            text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
            flat.append((f"{prefix}{key}", text))
    return flat


_EMPTY = '<p class="note">Nothing to show.</p>'
_COLOURS = 6
_STYLE = """
:root{color-scheme:light dark;--bg:#fff;--fg:#1c2430;--soft:#5b6675;--line:#dfe4ea;
--c0:#2563eb;--c1:#c2410c;--c2:#0f766e;--c3:#a21caf;--c4:#a16207;--c5:#475569}
@media (prefers-color-scheme:dark){:root{--bg:#11151b;--fg:#e3e8ee;--soft:#98a4b3;--line:#2a323d;
--c0:#7aa7ff;--c1:#fb923c;--c2:#2dd4bf;--c3:#e879f9;--c4:#facc15;--c5:#a3b1c4}}
body{margin:0;background:var(--bg);color:var(--fg);font:15px/1.55 system-ui,sans-serif}
main{max-width:72rem;margin:0 auto;padding:2.5rem 1.25rem 4rem}
h1{font-size:1.6rem;font-weight:650;margin:0 0 1rem}h2{font-size:1.1rem;font-weight:600;margin:2.5rem 0 .6rem}
.note,.axis{color:var(--soft);font-size:.87rem;margin:.5rem 0}.scroll{overflow-x:auto}
table{border-collapse:collapse;font-size:.9rem}th,td{padding:.35rem .65rem;text-align:left;white-space:nowrap}
th{font-weight:600;color:var(--soft)}thead th{white-space:normal;vertical-align:bottom}
thead th,tbody td,tbody th{border-bottom:1px solid var(--line)}
.n{text-align:right;font-variant-numeric:tabular-nums}small{color:var(--soft);font-size:.82em}
.heat td,.heat thead th+th{text-align:center}.heat td{border:2px solid var(--bg)}
.heat .d{outline:1.5px solid var(--fg);outline-offset:-3px}
dl{display:grid;grid-template-columns:max-content 1fr;gap:.25rem 1.25rem;font-size:.9rem;margin:0}
dt{color:var(--soft)}dd{margin:0;overflow-wrap:anywhere;font-family:ui-monospace,monospace;font-size:.85rem}
svg{width:100%;max-width:46rem;height:auto}svg text{fill:var(--soft);stroke:none;font-size:12px}.bar{opacity:.55}
svg path{stroke-linecap:round}.mark{opacity:.35;stroke-dasharray:2 3}
.traces{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(26rem,100%),1fr));gap:.6rem 1.5rem}
figure{margin:0}figcaption{color:var(--soft);font-size:.87rem}
.legend{display:flex;flex-wrap:wrap;gap:.2rem 1.2rem;list-style:none;padding:0;margin:.3rem 0;font-size:.88rem}
.legend li::before{content:"";display:inline-block;width:.7em;height:.7em;border-radius:50%;background:currentColor;
margin-right:.45em}.legend .hollow::before{background:none;box-shadow:inset 0 0 0 2px currentColor}
.c0{color:var(--c0)}.c1{color:var(--c1)}.c2{color:var(--c2)}.c3{color:var(--c3)}.c4{color:var(--c4)}.c5{color:var(--c5)}
"""
