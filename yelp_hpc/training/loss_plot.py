"""The picture of a training: loss of every step and on the validation rows.

Writes `train/loss.png` from the lines of `train/log.jsonl`.
"""

from __future__ import annotations

from collections.abc import Sequence
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

from yelp_hpc.evaluation.charts import smooth
from yelp_hpc.evaluation.picture import picture
from yelp_hpc.rundir.files import write_bytes

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def draw_loss(lines: Sequence[dict[str, Any]], path: Path) -> None:
    """Draw the loss over the steps and the learning rate below it. Does nothing without lines."""
    lines = [line for line in lines if line.get("loss") is not None]
    if not lines:
        return
    image = BytesIO()
    with picture(image, 8, 5.5) as figure:
        _draw(figure, lines)
    write_bytes(path, image.getvalue())


def _draw(figure: Figure, lines: Sequence[dict[str, Any]]) -> None:
    steps = [line["step"] for line in lines]
    losses = [line["loss"] for line in lines]
    checked = [line for line in lines if line.get("validation_loss") is not None]
    upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=[4, 1])
    upper.plot(steps, losses, color="#9ecae1", linewidth=1, label="training loss, each step")
    upper.plot(steps, smooth(losses), color="#08519c", linewidth=2, label="training loss, smoothed")
    if min(losses) > 0 and max(losses) > 8 * min(losses):  # else the end of the run is a flat line
        upper.set_yscale("log")
    if checked:
        upper.plot(
            [line["step"] for line in checked],
            [line["validation_loss"] for line in checked],
            color="#d94801",
            marker="o",
            markersize=5,
            linewidth=1.5,
            label="validation loss",
        )
        best = min(checked, key=lambda line: line["validation_loss"])
        upper.set_title(
            f"validation loss {checked[-1]['validation_loss']:.4f} at the end, "
            f"best {best['validation_loss']:.4f} at step {best['step']}",
            fontsize=10,
        )
    upper.set_ylabel("loss per supervised token")
    upper.grid(alpha=0.3)
    upper.legend(frameon=False)
    lower.plot(steps, [line["learning_rate"] for line in lines], color="#31a354", linewidth=1.5)
    lower.set_ylabel("learning rate")
    lower.ticklabel_format(axis="y", style="sci", scilimits=(-2, 2))
    lower.set_xlabel("optimizer step")
    lower.grid(alpha=0.3)
