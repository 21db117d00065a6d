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
    figure = Figure(figsize=(1.6 + 0.85 * len(shown), 4.6), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    image = axes.imshow(shares, cmap="Blues", vmin=0, vmax=1, aspect="auto")
    for i, row in enumerate(matrix):
        for j, c in enumerate(shown):
            dark = shares[i][j] > 0.5
            text = f"{row[c]:,}\n{shares[i][j]:.0%}"
            colour = "white" if dark else "black"
            axes.text(j, i, text, ha="center", va="center", fontsize=9, color=colour)
    axes.set_xticks(range(len(shown)), [columns[c] for c in shown])
    axes.set_yticks(range(labels), [columns[i] for i in range(labels)])
    axes.set_xlabel("answer")
    axes.set_ylabel("truth")
    figure.colorbar(image, ax=axes, label="share of the truth's rows")
    png = BytesIO()
    figure.savefig(png, format="png", metadata={"Software": None})
    return png.getvalue()
