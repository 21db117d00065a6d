"""Charts of the report page: numbers in, inline SVG out. No file, no script, no font to load.

Colours are the page's CSS variables, so that a chart follows the colour scheme; each chart has a
text alternative in its label. Coordinates are those of a phone's width, so text stays legible.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from yelp_hpc.rundir.attempts import Attempt, last_seen, lasted

WIDTH = 360
Points = Sequence[tuple[float, float]]


def _svg(height: float, label: str, body: Sequence[str]) -> str:
    return (
        f'<svg viewBox="0 0 {WIDTH} {height:.0f}" role="img" aria-label="{escape(label)}">'
        f"<title>{escape(label)}</title>{''.join(body)}</svg>"
    )


def _text(x: float, y: float, text: str, kind: str = "", anchor: str = "middle") -> str:
    return (
        f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" class="{kind}">{escape(text)}</text>'
    )


def ticks(low: float, high: float, count: int = 5) -> list[float]:
    """Round numbers that span `low` to `high` (steps of 1, 2 or 5 times a power of ten)."""
    if not high > low:
        return [low]
    rough = (high - low) / count
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * factor for factor in (1, 2, 5, 10) if power * factor >= rough)
    first = math.ceil(low / step - 1e-9)
    return [i * step for i in range(first, math.floor(high / step + 1e-9) + 1)]


def short(value: float) -> str:
    """A number in little room: `1200` → `1.2k`, `0.0005` → `5e-4`."""
    if abs(value) >= 1_000_000:
        return f"{value / 1e6:.3g}M"
    if abs(value) >= 10_000 or (abs(value) >= 1000 and value % 100 == 0):
        return f"{value / 1000:.3g}k"
    if 0 < abs(value) < 0.01:
        digits, power = f"{value:.1e}".split("e")
        return f"{float(digits):g}e{int(power)}"
    return f"{value:.4g}"


def thin(points: Points) -> list[tuple[float, float]]:
    """At most 300 points: each the middle and the mean of a run of neighbours."""
    run = math.ceil(len(points) / 300) or 1
    chunks = [points[i : i + run] for i in range(0, len(points), run)]
    return [(sum(x for x, _ in c) / len(c), sum(y for _, y in c) / len(c)) for c in chunks]


def smooth(values: Sequence[float]) -> list[float]:
    """A line through the noise that neither lags nor leads: a straight line fitted around each.

    Local linear regression with triangular weights (Fan 1993): at the ends, where there are
    neighbours on one side alone, it keeps the slope. The window is a tenth of the values, 5 to 101.
    """
    count = len(values)
    half = max(2, min(50, count // 20))
    found = []
    for i in range(count):
        near = range(max(0, i - half), min(count, i + half + 1))
        weights = [half + 1 - abs(j - i) for j in near]
        total = sum(weights)
        middle = sum(w * j for w, j in zip(weights, near, strict=True)) / total
        mean = sum(w * values[j] for w, j in zip(weights, near, strict=True)) / total
        spread = sum(w * (j - middle) ** 2 for w, j in zip(weights, near, strict=True))
        tilt = sum(w * (j - middle) * values[j] for w, j in zip(weights, near, strict=True))
        found.append(mean + (tilt / spread * (i - middle) if spread else 0.0))
    return found


def log_ticks(low: float, high: float) -> list[float]:
    """1, 2 and 5 times powers of ten between `low` and `high`."""
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    every = [factor * 10.0**power for power in powers for factor in (1, 2, 5)]
    return [value for value in every if low <= value <= high]


def lines(
    title: str, series: Mapping[str, Points], x_name: str, y_name: str, wide_range: bool = False
) -> str:
    """A line a series over a shared x axis, named in a legend above; "" without points.

    Colours follow the order of the series; one whose name ends in "each step" is drawn faint.

    Args:
        wide_range: the y axis is logarithmic where the values, all above 0, span more than 8 to 1.
    """
    series = {name: thin(points) for name, points in series.items() if points}
    if not series:
        return ""
    every = [point for points in series.values() for point in points]
    x0, x1 = min(x for x, _ in every), max(x for x, _ in every)
    y0, y1 = min(y for _, y in every), max(y for _, y in every)
    log = wide_range and y0 > 0 and y1 / y0 > 8
    y0 = 0.0 if 0 <= y0 < 0.5 * y1 and not log else y0
    if y1 <= y0:
        y1 = y0 + (abs(y0) or 1.0)
    left, right, top, bottom = 52.0, 350.0, 34.0, 190.0
    scale = math.log10 if log else float

    def px(x: float) -> float:
        return left + (x - x0) / ((x1 - x0) or 1) * (right - left)

    def py(y: float) -> float:
        share = (scale(y) - scale(y0)) / (scale(y1) - scale(y0))
        return bottom - share * (bottom - top)

    body = [_upright((top + bottom) / 2, f"{y_name} (log scale)" if log else y_name)]
    for y in log_ticks(y0, y1) if log else ticks(y0, y1):
        body.append(f'<path class="grid" d="M{left} {py(y):.1f}H{right}"/>')
        body.append(_text(left - 5, py(y) + 4, short(y), "tick", "end"))
    body += [_text(px(x), bottom + 15, short(x), "tick") for x in ticks(x0, x1)]
    body.append(_text((left + right) / 2, bottom + 31, x_name, "tick"))
    place = left
    for i, (name, points) in enumerate(series.items()):
        path = "L".join(f"{px(x):.1f} {py(y):.1f}" for x, y in points)
        faint = " faint" if name.endswith("each step") else ""
        body.append(f'<path class="line s{i}{faint}" d="M{path}"/>')
        if len(points) <= 12:
            body += [f'<circle class="dot s{i}" cx="{px(x):.1f}" cy="{py(y):.1f}" r="3"/>'
                     for x, y in points]  # fmt: skip
        body.append(
            f'<rect class="box s{i}{faint}" x="{place:.0f}" y="12" width="10" height="10"/>'
        )
        body.append(_text(place + 14, 21, name, "tick", "start"))
        place += 26 + 6.3 * len(name)
    last = "; ".join(f"{n}: first {p[0][1]:.4g}, last {p[-1][1]:.4g}" for n, p in series.items())
    return _svg(228, f"{title}: {y_name} over {x_name}. {last}", body)


def _upright(y: float, text: str) -> str:
    """The name of a y axis, read from below."""
    x = 11.0
    return f'<g transform="rotate(-90 {x} {y:.1f})">{_text(x, y, text, "tick")}</g>'


def _cut_apart(texts: Sequence[str], most: int) -> list[str]:
    """Texts cut at their ends, or in their middles where else two would look the same."""
    cut = [_cut(text, most) for text in texts]
    if len({*cut}) == len({*texts}):
        return cut
    end = most // 3
    return [t if len(t) <= most else f"{t[: most - end - 1]}…{t[-end:]}" for t in texts]


def confusion(name: str, matrix: Sequence[Sequence[int]], columns: Sequence[str]) -> str:
    """A heat map: a row for each true label, coloured by the share of the row.

    Args:
        columns: the classes' names, then "unparsed" and what else was answered.

    Few classes have their counts written in; of many only the cells that hold something are
    drawn, and every so many classes are named.
    """
    classes = len(matrix)
    shown = [c for c in range(len(columns)) if c < classes or any(row[c] for row in matrix)]
    roomy = classes <= 7
    left = 64.0 if roomy else 104.0
    wide = (WIDTH - left - 4) / len(shown)
    cell = 34.0 if roomy else wide
    step = math.ceil(9 / cell)  # lines of text need this much room
    longest = 10 if roomy else 14
    top = 44.0 if roomy else 112.0
    titles = {"unparsed": "none", f"outside 0-{classes - 1}": "other"}
    names = _cut_apart(columns, longest)
    body = [_text(left + wide * len(shown) / 2, 12, "answered", "tick")]
    body.append(_text(left - 8, 12, "truth ↓", "tick", "end"))
    for j, column in enumerate(shown):
        if column < classes and column % step:
            continue
        text = names[column]
        if column >= classes:
            text = titles.get(columns[column], text)
        x = left + (j + 0.5) * wide
        if roomy:
            body.append(_text(x, 34, _cut(text, max(3, int(wide / 6.2))), "tick"))
        else:
            turn = f"rotate(-90 {x + 3:.1f} {top - 5:.1f})"
            upright = _text(x + 3, top - 5, text, "tick", "start")
            body.append(f'<g transform="{turn}">{upright}</g>')
    for i, row in enumerate(matrix):
        total = sum(row)
        y = top + i * cell
        if i % step == 0:
            place = y + min(21.0, cell / 2 + 4)
            body.append(_text(left - 8, place, names[i], "tick", "end"))
        for j, column in enumerate(shown):
            count = row[column]
            share = count / total if total else 0.0
            x, gap = left + j * wide, 2.0 if roomy else min(1.0, 0.1 * wide)
            # of a thousand classes a cell is less than a point: seen all the same
            size = f'width="{max(1.0, wide - gap):.1f}" height="{max(1.0, cell - gap):.1f}"'
            if roomy:
                size += ' rx="3"'
                body.append(f'<rect class="under" x="{x:.1f}" y="{y:.1f}" {size}/>')
            if roomy or count:
                about = (
                    ""
                    if roomy
                    else (
                        f"<title>{escape(columns[i])} taken for {escape(columns[column])}: "
                        f"{count:,} of {total:,}</title>"
                    )
                )
                body.append(
                    f'<rect class="heat" x="{x:.1f}" y="{y:.1f}" {size} '
                    f'fill-opacity="{max(share, 0.0 if roomy else 0.06):.3f}">{about}</rect>'
                )
            if roomy:
                kind = "cell strong" if share > 0.55 else "cell"
                body.append(_text(x + wide / 2 - 1, y + 20, short(count), kind))
    high = top + cell * classes
    if not roomy:
        body.append(
            f'<path class="grid" fill="none" d="M{left} {top}H{WIDTH - 4}V{high:.1f}H{left}Z"/>'
        )
    right = sum(matrix[i][i] for i in range(classes))
    rows = sum(map(sum, matrix))
    said = [
        f"{columns[i]}: {row[i]} of {sum(row)} right" for i, row in enumerate(matrix[:20])
    ]  # fmt: skip
    label = f"Confusion of the {name} model, {right} of {rows} right. " + "; ".join(said)
    return _svg(high + 4, label, body)


def _cut(text: str, longest: int) -> str:
    return text if len(text) <= longest else text[: longest - 1] + "…"


def calibration(name: str, summary: Mapping[str, Any]) -> str:
    """A reliability diagram: accuracy a bin of confidence, against the diagonal."""
    left, right, top, bottom = 52.0, 350.0, 10.0, 200.0
    body = [_upright((top + bottom) / 2, "accuracy")]

    def px(x: float) -> float:
        return left + x * (right - left)

    def py(y: float) -> float:
        return bottom - y * (bottom - top)

    for y in (0, 0.25, 0.5, 0.75, 1):
        body.append(f'<path class="grid" d="M{left} {py(y):.1f}H{right}"/>')
        body.append(_text(left - 5, py(y) + 4, f"{y:g}", "tick", "end"))
        body.append(_text(px(y), bottom + 15, f"{y:g}", "tick"))
    said = []
    most = max(item["rows"] for item in summary["bins"])
    for item in summary["bins"]:
        if not item["rows"]:
            continue
        x, width = px(item["low"]) + 1, (item["high"] - item["low"]) * (right - left) - 2
        # Faint where few rows stand behind the bar: it is mostly chance.
        faint = 0.25 + 0.65 * math.sqrt(item["rows"] / most)
        height = bottom - py(item["accuracy"])
        body.append(
            f'<rect class="bar s0" x="{x:.1f}" y="{bottom - height:.1f}" width="{width:.1f}" '
            f'height="{height:.1f}" fill-opacity="{faint:.2f}"/>'
        )
        said.append(f"{item['confidence']:.2f}: {item['accuracy']:.2f} ({item['rows']} rows)")
    body.append(f'<path class="diagonal" d="M{px(0)} {py(0)}L{px(1)} {py(1)}"/>')
    body.append(_text((left + right) / 2, bottom + 31, "confidence", "tick"))
    label = (
        f"Calibration of the {name} model, expected calibration error {summary['ece']:.3f}. "
        f"Confidence: accuracy by bin, {'; '.join(said)}"
    )
    return _svg(238, label, body)


def timeline(starts: Sequence[Attempt]) -> str:
    """A row a job, a bar a start; "" without starts. One that runs ends at its heartbeat."""
    if not starts:
        return ""
    start = min(a.started for a in starts)
    end = max(max(last_seen(a) for a in starts), start + 1)
    names = list(dict.fromkeys(a.name for a in starts))
    left, right, high = 84.0, 350.0, 24.0
    bottom = 8 + high * len(names)
    hours = end - start > 2 * 3600
    unit, name = (3600.0, "hours") if hours else (60.0, "minutes")
    body = []
    for t in ticks(0, (end - start) / unit):
        x = left + t * unit / (end - start) * (right - left)
        body.append(f'<path class="grid" d="M{x:.1f} 4V{bottom:.1f}"/>')
        body.append(_text(x, bottom + 15, short(t), "tick"))
    for i, job in enumerate(names):
        y = 6 + i * high
        body.append(_text(left - 6, y + 14, job[:13], "tick", "end"))
        for a in starts:
            if a.name != job:
                continue
            x = left + (a.started - start) / (end - start) * (right - left)
            width = max(lasted(a) / (end - start) * (right - left), 2)
            verdict = a.verdict or "running"
            body.append(
                f'<rect class="job {escape(verdict)}" x="{x:.1f}" y="{y:.1f}" '
                f'width="{width:.1f}" height="16" rx="2"><title>{escape(job)}: '
                f"{escape(verdict)}, {lasted(a):.0f} s</title></rect>"
            )
    began = time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime(start))
    body.append(_text((left + right) / 2, bottom + 31, f"{name} after {began}", "tick"))
    interrupted = sum(a.verdict not in ("done", "") for a in starts)
    label = (
        f"Timeline: {len(starts)} starts of {len(names)} jobs in {(end - start) / unit:.1f} "
        f"{name}, {interrupted} of them interrupted or failed; the table below lists them"
    )
    return _svg(bottom + 38, label, body)


_BESIDE = 19
"""Characters of a name that have room beside its line."""


def forest(title: str, rows: Sequence[tuple[str, float, Sequence[float] | None]]) -> str:
    """A row a model: its figure as a dot, the interval as a line; the first row stands on top.

    Long names, whose ends tell them apart, stand above their lines.
    """
    above = max(len(name) for name, *_ in rows) > _BESIDE
    high, top, left, right = (40.0, 8.0, 12.0, 344.0) if above else (24.0, 8.0, 128.0, 344.0)
    ends = [x for _, value, pair in rows for x in (value, *(pair or ()))]
    low, most = min(ends), max(ends)
    pad = 0.05 * (most - low) or 0.05
    low, most = low - pad, most + pad
    bottom = top + high * len(rows)

    def px(x: float) -> float:
        return left + (x - low) / (most - low) * (right - left)

    body = []
    for x in ticks(low, most, 4):
        body.append(f'<path class="grid" d="M{px(x):.1f} {top}V{bottom:.1f}"/>')
        body.append(_text(px(x), bottom + 15, f"{x:.3g}", "tick"))
    said = []
    for i, (name, value, pair) in enumerate(rows):
        y = top + (i + (0.75 if above else 0.5)) * high
        if above:
            body.append(_text(left, y - 12, _cut(name, 56), "tick", "start"))
        else:
            body.append(_text(left - 8, y + 4, name, "tick", "end"))
        if pair:
            body.append(f'<path class="line s0" d="M{px(pair[0]):.1f} {y}H{px(pair[1]):.1f}"/>')
        body.append(f'<circle class="dot s0" cx="{px(value):.1f}" cy="{y}" r="4"/>')
        said.append(f"{name} {value:.3f}" + (f" ({pair[0]:.3f} to {pair[1]:.3f})" if pair else ""))
    return _svg(bottom + 24, f"{title}, with 95 % intervals. " + "; ".join(said), body)
