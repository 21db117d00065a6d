"""A picture as PNG bytes, the same for everybody: no setting of the user's matplotlib counts."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from io import BytesIO
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@contextmanager
def picture(png: BytesIO, width: float, height: float) -> Iterator[Figure]:
    """A figure of so many inches, which `png` holds after the block.

    A `matplotlibrc` may want a LaTeX that no node has, or another look.
    """
    os.environ.pop("MPLBACKEND", None)  # a notebook's, which need not be installed here
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        figure = Figure(figsize=(width, height), dpi=120, layout="constrained")
        FigureCanvasAgg(figure)
        yield figure
        # without the version of matplotlib, equal content gives equal bytes
        figure.savefig(png, format="png", metadata={"Software": None})
