"""The picture of a model's answers: truth against answer, shares of each truth coloured.

Returns PNG bytes from the confusion matrix of `metrics.json`; equal counts give equal bytes.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from io import BytesIO

from yelp_hpc.evaluation.picture import picture


def draw_confusion(matrix: Sequence[Sequence[int]], columns: Sequence[str]) -> bytes:
    """Draw counts `[labels, columns]`; empty columns that no label names are left out.

    Args:
        columns: a title for each column: the labels, then "unparsed" and what else was answered.
            A label whose letters the font lacks is shown by its number, from 0.
    """
    labels = len(matrix)
    shown = [c for c in range(len(columns)) if c < labels or any(row[c] for row in matrix)]
    totals = [max(1, sum(row)) for row in matrix]
    shares = [[row[c] / total for c in shown] for row, total in zip(matrix, totals, strict=True)]
    # Counts and shares stand in the cells as long as they can be read there.
    side = 0.85 if labels <= 7 else max(min(0.06, 20 / labels), min(0.28, 12 / labels))
    longest = max(len(_shown(columns, c)) for c in shown)
    margin = 1.6 + 0.2 * max(0, longest - 11) if labels <= 7 else 1.2 + 0.09 * min(longest, 28)
    high = 4.6 if labels <= 7 else side * labels + margin
    png = BytesIO()
    with picture(png, margin + side * len(shown), high) as figure:
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
        # a dollar in a label begins no formula
        axes.set_xticks(named, [_shown(columns, shown[j]) for j in named], parse_math=False)
        rows = range(0, labels, step)
        axes.set_yticks(rows, [_shown(columns, i) for i in rows], parse_math=False)
        if labels > 7:
            axes.tick_params(labelsize=7)
        if labels > 7 or longest > 11:
            axes.tick_params(axis="x", labelrotation=90 if labels > 7 else 30)
        axes.set_xlabel("answer")
        axes.set_ylabel("truth")
        figure.colorbar(image, ax=axes, label="share of the truth's rows")
    return png.getvalue()


@cache
def _letters() -> frozenset[int]:
    """What the font has."""
    from matplotlib.font_manager import findfont, get_font

    return frozenset(get_font(findfont("DejaVu Sans")).get_charmap())


def _shown(columns: Sequence[str], place: int) -> str:
    """A title, cut; the number of a class whose letters the font has not."""
    text = columns[place].expandtabs(1)
    if not set(map(ord, text)) <= _letters():
        return f"class {place}"
    return text if len(text) <= 28 else text[:27] + "…"
