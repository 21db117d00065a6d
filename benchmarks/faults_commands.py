"""What faults.py strikes, the commands: submit, cancel, publish and a job's supervisor.

The Hub is the tests' local server, Slurm is four scripts that keep their queue in a folder.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import sys
from pathlib import Path

from benchmarks.faults import Files, Unit, files_of
from benchmarks.faults_small import record_run, small_package, unsubmitted
from yelp_hpc.rundir.paths import RunPaths

SLURM = {
    "sbatch": """
script=${!#}
n=$(($(cat $S/next) + 1)); echo $n >$S/next
name=$(sed -n 's/^#SBATCH --job-name=//p' $script | tr -d \\'\\")
echo "$n|$name|$script" >$S/jobs/$n
echo $n""",
    "squeue": """
echo "JOBID|STATE|REASON|NODELIST|TIME|TIME_LIMIT|RESTARTS|SUBMIT|USER|NAME|COMMAND|"
wanted=,$(echo "$*" | sed -n 's/.*--jobs=//p'),
for job in $S/jobs/*; do [ -e $job ] || continue
  IFS='|' read n name script <$job
  case "$*" in *--jobs=*) case $wanted in *,$n,*) ;; *) continue;; esac;; esac
  echo "$n|PENDING|None||0:00|1:00|0|1700000000|$(id -un)|$name|$script|"
done""",
    "scancel": 'for n in "$@"; do rm -f $S/jobs/$n; done',
    "scontrol": "exit 1",
    "sacct": "exit 1",
    "srun": "exit 1",
}


class Slurm:
    """Scripts that stand for Slurm's; their queue is a folder outside of what is struck."""

    def __init__(self, top: Path) -> None:
        self.state, self.queued = top / "state", top / "queued"
        self.programs = top / "bin"
        self.programs.mkdir(parents=True)
        for name, text in SLURM.items():
            path = self.programs / name
            path.write_text(f"#!/bin/bash\nS={self.state}\n{text}\n")
            path.chmod(0o755)
        self.reset()

    def bring_back(self) -> None:
        """Let the queue hold what `submitted` queued."""
        shutil.rmtree(self.state, ignore_errors=True)
        shutil.copytree(self.queued, self.state)
        for job in (self.state / "jobs").iterdir():  # queued from where the run was made
            job.write_text(job.read_text().replace("/template/", "/run/"))

    def reset(self) -> None:
        """Empty the queue."""
        shutil.rmtree(self.state, ignore_errors=True)
        (self.state / "jobs").mkdir(parents=True)
        (self.state / "next").write_text("100\n")

    def jobs(self) -> dict[str, str]:
        """Job id → name of what is queued."""
        return {p.name: p.read_text().split("|")[1] for p in (self.state / "jobs").iterdir()}

    def submit(self, folder: Path) -> None:
        """`submit all` to it; the model and the data, which are not there, are not looked at."""
        from yelp_hpc.config import load_config
        from yelp_hpc.jobs import chain
        from yelp_hpc.jobs.cluster import ClusterConfig

        setattr(chain, "require_sound_request", lambda *_: ())  # noqa: B010

        os.environ["PATH"] = f"{self.programs}:{os.environ['PATH']}"
        small_package()
        record_run(folder)
        config = load_config(folder.parent / "config.json").config
        chain.submit("all", folder, config, ClusterConfig(), "slurm", say=lambda text: None)

    def submit_again(self, folder: Path) -> None:
        """What a user does: the same, and where jobs are queued already, cancel first."""
        from yelp_hpc.errors import RequestError

        try:
            self.submit(folder)
        except RequestError as error:
            if "already submitted" not in str(error):
                raise
            self.cancel(folder)
            self.submit(folder)

    def cancel(self, folder: Path) -> None:
        """`cancel` of the run."""
        from yelp_hpc.jobs.chain import cancel

        os.environ["PATH"] = f"{self.programs}:{os.environ['PATH']}"
        cancel(folder)

    def submitted(self, folder: Path) -> None:
        """A run whose chain is queued, by a submission that was killed before it kept a record."""
        self.reset()
        unsubmitted(folder)
        self.submit(folder)
        RunPaths(folder).submissions.unlink()
        shutil.copytree(self.state, self.queued)

    def lost(self, folder: Path, done: bool) -> int:
        """Queued jobs that `status`, `cancel` and the next submission would not know of."""
        from yelp_hpc.jobs.submission import living

        os.environ["PATH"] = f"{self.programs}:{os.environ['PATH']}"
        return len(self.jobs().keys() - {item.job for item in living(RunPaths(folder))})

    def content(self, folder: Path) -> Files:
        """What is queued, each name once, and the kinds of files."""
        # whether a cancel was needed depends on how far the struck submission came
        names = files_of(folder).keys() - {"logs/cancelled"}
        kinds = {re.sub(r"[0-9a-f]{12,}|\d+", "#", name): b"" for name in names}
        return {**kinds, "queue": json.dumps(sorted(self.jobs().values())).encode()}


class Publishing:
    """A finished run, and a local Hub in a process of its own."""

    def __init__(self, top: Path) -> None:
        self.top, self.hub = top, top / "hub"
        self.pid = 0

    def start(self) -> None:
        """Serve the Hub until the process ends."""
        reading, writing = os.pipe()
        self.pid = os.fork()
        if self.pid == 0:
            import time

            from tests.hub.server import serving
            from tests.hub.state import Hub

            hub = Hub(self.hub)
            hub.tokens = {"good-token": {"user": "me", "write": True}}
            with serving(hub):
                os.write(writing, hub.url.encode())
                while os.getppid() != 1:
                    time.sleep(0.5)
            os._exit(0)
        os.environ["HF_ENDPOINT"] = os.read(reading, 200).decode()
        os.environ["HF_TOKEN"] = "good-token"

    def reset(self) -> None:
        """Empty the Hub."""
        for path in (self.hub / "repos").glob("*"):
            path.unlink()

    def finished(self, folder: Path) -> None:
        """A run that is collected."""
        from tests.hub.finished import finish_run

        finish_run(folder, self.top / "published-model")

    def publish(self, folder: Path) -> None:
        """The stage publish."""
        from tests.hub.finished import settings
        from yelp_hpc.publishing.hub import Backoff
        from yelp_hpc.stages import publish

        config = settings(self.top / "published-model")
        publish.run(RunPaths(folder), config, backoff=Backoff(2, 0.01, 0.02))

    def content(self, folder: Path) -> Files:
        """The run's files, without the time of publication, and the Hub's."""
        found = files_of(folder)
        record = json.loads(found["published.json"])
        found["published.json"] = json.dumps({**record, "published": "", "commit": ""}).encode()
        for path in (self.hub / "repos").glob("*.json"):
            state = json.loads(path.read_text())
            head = state["commits"][state["refs"]["refs/heads/main"]]["files"]
            found["hub"] = json.dumps([sorted(head.items()), len(state["commits"])]).encode()
        return found


def _supervised(folder: Path) -> None:
    """A run whose stages are played by tests/jobs/fake_stage.py."""
    from yelp_hpc.jobs.cluster import ClusterConfig
    from yelp_hpc.jobs.snapshot import freeze_settings

    folder.mkdir(parents=True)
    (folder / "run.json").write_text(json.dumps({"shards": 1}))
    (folder / "fake.json").write_text(json.dumps({"steps": 1}))
    fake = Path(__file__).resolve().parent.parent / "tests" / "jobs" / "fake_stage.py"
    cluster = ClusterConfig.model_validate({"command": [sys.executable, str(fake)]})
    content = {"cluster": cluster.model_dump(mode="json"), "image_sha256": None}
    freeze_settings(RunPaths(folder), content)


def _supervise(folder: Path) -> None:
    from yelp_hpc.jobs.supervisor import supervise

    settings = next(RunPaths(folder).logs.glob("cluster-*.json"))
    supervise("prepare", str(folder), str(settings))


def _supervised_files(folder: Path) -> Files:
    kept = {k: v for k, v in files_of(folder).items() if not k.startswith(("logs/att", "trace"))}
    return {k: b"" if k.endswith(".log") else v for k, v in kept.items()}


def command_units(slurm: Slurm, publishing: Publishing) -> list[Unit]:
    """The commands that speak with others."""
    return [
        Unit(
            "publish",
            publishing.finished,
            publishing.publish,
            content=publishing.content,
            small=False,
            reset=publishing.reset,
        ),
        Unit(
            "submit",
            unsubmitted,
            slurm.submit,
            slurm.submit_again,
            slurm.content,
            slurm.lost,
            small=False,
            reset=slurm.reset,
        ),
        Unit(
            "cancel",
            slurm.submitted,
            slurm.cancel,
            content=slurm.content,
            lost=slurm.lost,
            small=False,
            reset=slurm.bring_back,
        ),
        Unit("supervise", _supervised, _supervise, content=_supervised_files, small=False),
    ]
