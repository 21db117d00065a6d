"""The picture of a model's answers: truth against answer, shares of each truth coloured.

Returns PNG bytes from the confusion matrix of `metrics.json`; equal counts give equal bytes.
"""

from __future__ import annotations

from collections.abc import Sequence
from io import BytesIO


def draw_confusion(matrix: Sequence[Sequence[int]], columns: Sequence[str]) -> bytes:
    """Draw counts `[labels, columns]`; empty columns that no label names are left out.

    Args:
        columns: a title for each column: the labels, then "unparsed" and what else was answered.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    labels = len(matrix)
    shown = [c for c in range(len(columns)) if c < labels or any(row[c] for row in matrix)]
    totals = [max(1, sum(row)) for row in matrix]
    shares = [[row[c] / total for c in shown] for row, total in zip(matrix, totals, strict=True)]
    # Counts and shares stand in the cells as long as they can be read there.
    side = 0.85 if labels <= 7 else max(0.06, min(0.28, 12 / labels))
    longest = max(len(columns[c]) for c in shown)
    margin = 1.6 if labels <= 7 else 1.2 + 0.09 * min(longest, 28)
    high = 4.6 if labels <= 7 else side * labels + margin
    figure = Figure(figsize=(margin + side * len(shown), high), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    image = axes.imshow(shares, cmap="Blues", vmin=0, vmax=1, aspect="auto")
    for i, row in enumerate(matrix if labels <= 7 else ()):
        for j, c in enumerate(shown):
            dark = shares[i][j] > 0.5
            text = f"{row[c]:,}\n{shares[i][j]:.0%}"
            colour = "white" if dark else "black"
            axes.text(j, i, text, ha="center", va="center", fontsize=9, color=colour)
    step = 1 if labels <= 7 else max(1, round(0.14 / side))
    named = [j for j, c in enumerate(shown) if c >= labels or c % step == 0]
    axes.set_xticks(named, [_cut(columns[shown[j]]) for j in named])
    rows = range(0, labels, step)
    axes.set_yticks(rows, [_cut(columns[i]) for i in rows])
    if labels > 7:
        axes.tick_params(labelsize=7)
    if labels > 7 or longest > 11:
        axes.tick_params(axis="x", labelrotation=90 if labels > 7 else 30)
    axes.set_xlabel("answer")
    axes.set_ylabel("truth")
    figure.colorbar(image, ax=axes, label="share of the truth's rows")
    png = BytesIO()
    figure.savefig(png, format="png", metadata={"Software": None})
    return png.getvalue()


def _cut(text: str) -> str:
    return text if len(text) <= 28 else text[:27] + "…"
