"""run.json under two writers at once, and under a killed one."""

from __future__ import annotations

import threading
from pathlib import Path

from yelp_hpc.rundir.files import read_json, write_json
from yelp_hpc.rundir.manifest import update_run
from yelp_hpc.rundir.paths import RunPaths


def test_sections_that_several_write_at_once_are_all_kept(tmp_path: Path) -> None:
    run = RunPaths(tmp_path)
    write_json(run.run_json, {"seed": 1})

    def write(name: str) -> None:
        for i in range(25):
            update_run(run, **{f"{name}{i}": i})

    threads = [threading.Thread(target=write, args=(name,)) for name in "abc"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(read_json(run.run_json)) == 76
