"""The manual's pictures of a finished run: its outcome in a terminal, and its report.

    python docs/pictures/make.py runs/demo

Reads metrics.json and report.html; writes outcome.svg and report.png beside this file. The second
needs chromium.
"""

from __future__ import annotations

import io
import re
import subprocess
import sys
import tempfile
from pathlib import Path

from rich.console import Console

from yelp_hpc.evaluation.outcome import print_outcome
from yelp_hpc.rundir.files import read_object
from yelp_hpc.rundir.manifest import load_run

HERE = Path(__file__).parent


def main(root: str) -> None:
    """Draw both."""
    run, config = load_run(root)
    screen = Console(record=True, width=80, file=io.StringIO(), force_terminal=True)
    print_outcome(read_object(run.metrics), config.data.model_dump(), screen)
    drawn = screen.export_svg(title=f"yelp-hpc collect --run {root}", unique_id="outcome")
    # rich names a font of the net; a page of ours asks for nothing
    drawn = re.sub(r"@font-face \{.*?\}\s*", "", drawn, flags=re.DOTALL)
    (HERE / "outcome.svg").write_text(drawn.replace("Fira Code, ", ""), encoding="utf-8")
    with tempfile.TemporaryDirectory() as profile:
        subprocess.run(
            ["chromium", "--headless=new", "--no-sandbox", "--hide-scrollbars",
             f"--user-data-dir={profile}", "--window-size=1000,1240",
             f"--screenshot={HERE / 'report.png'}", run.report.resolve().as_uri()],
            check=True, capture_output=True,
        )  # fmt: skip


if __name__ == "__main__":
    main(sys.argv[1])
