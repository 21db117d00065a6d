"""What would be submitted: scripts, packing, dependencies, commands and who gets which secret."""

from __future__ import annotations

import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from jobs.chain import plan, submit
from jobs.cluster import ClusterConfig
from jobs.container import command, stage_argv, stage_environment
from jobs.executor import refusal
from jobs.job import Job, pack
from tests.jobs.fake_run import FakeRun
from yelp_hpc.errors import RequestError, StageError
from yelp_hpc.paths import RunPaths

MakeRun = Callable[..., FakeRun]


def test_the_chain_and_its_dependencies(fake_run: MakeRun) -> None:
    run = fake_run()
    jobs = {job.name: job for job in plan("all", run.config, RunPaths(run.root), run.cluster)}
    assert list(jobs) == ["prepare", "train", "infer-base", "infer-tuned", "collect"]
    assert jobs["infer-base"].after == (("afterok", "prepare"),)
    assert jobs["infer-tuned"].after == (("afterok", "train"),)
    assert {kind for kind, _ in jobs["collect"].after} == {"afterany"}


@pytest.mark.parametrize(("shards", "limit"), [(1, 5), (5, 5), (6, 5), (1000, 7), (0, 3)])
def test_packing_keeps_every_shard_once_and_in_balance(shards: int, limit: int) -> None:
    tasks = [list(map(int, task.split(","))) for task in pack(list(range(shards)), limit)]
    assert [shard for task in tasks for shard in task] == list(range(shards))
    assert len(tasks) <= limit
    assert max(map(len, tasks), default=0) - min(map(len, tasks), default=0) <= 1


def test_only_missing_shards_are_planned(fake_run: MakeRun) -> None:
    run = fake_run(shards=6, cluster={"max_array_size": 2})
    for shard in (0, 3):
        path = RunPaths(run.root).shard("base", shard, 6)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"")
    jobs = plan("infer", run.config, RunPaths(run.root), run.cluster)
    assert [job.tasks for job in jobs] == [("1,2", "4,5"), ("0,1,2", "3,4,5")]


def test_dry_run_prints_scripts_that_bash_reads_and_submits_nothing(
    fake_run: MakeRun, capsys: pytest.CaptureFixture[str]
) -> None:
    evil = "x; touch $(pwd)/pwned #"
    cluster = {
        "defaults": {"partition": evil, "gpus": 4, "gpu_type": "rtx3090", "time": "2-0"},
        "train": {"nodes": 2},
    }
    run = fake_run("a run", cluster=cluster)
    made = submit("all", run.root, run.config, run.cluster, dry_run=True)
    train = made[1].script
    assert "#SBATCH --gres=gpu:rtx3090:4" in train
    assert "#SBATCH --nodes=2" in train
    assert "#SBATCH --signal=USR2@120" in train
    assert f"#SBATCH --partition={shlex.quote(evil)}" in train
    assert "--array=0-2%3" in made[2].script
    assert shlex.quote(str(run.root / "code" / "DIGEST")) in train
    assert subprocess.run(["bash", "-n"], input=train, text=True, check=False).returncode == 0
    assert made[1].command in capsys.readouterr().out
    assert not (run.root / "submissions.jsonl").exists()


@pytest.mark.parametrize("name", ["a%j", "a:b", "a$(x)", "a\nb", "a'b"])
def test_names_that_slurm_or_a_shell_would_read_are_refused(name: str, fake_run: MakeRun) -> None:
    run = fake_run()
    with pytest.raises(RequestError, match="holds"):
        submit("all", run.root.parent / name, run.config, run.cluster, dry_run=True)


def container(image: str = "/i.sif") -> ClusterConfig:
    return ClusterConfig.model_validate(
        {"container": {"image": image, "nv": True, "env": ["MINE"], "binds": ["/data:/data:ro"]}}
    )


def test_only_what_is_named_enters_the_image() -> None:
    env = {"MINE": "1", "PYTHONPATH": "/x", "LD_LIBRARY_PATH": "/y", "HF_TOKEN": "hf_secret"}
    argv = command(container(), Path("/run"), stage_argv("infer", Path("/run"), "base", "3"), env)
    text = shlex.join(argv)
    assert argv[:3] == ["apptainer", "exec", "--cleanenv"]
    assert "--nv" in argv
    assert "MINE=1" in argv
    assert "--bind /data:/data:ro" in text
    assert text.endswith("yelp_hpc run infer --run /run --model base --shard 3")
    for absent in ("PYTHONPATH", "LD_LIBRARY_PATH", "hf_secret"):
        assert absent not in text


@pytest.mark.parametrize("cluster", [ClusterConfig(), container()])
def test_the_token_reaches_publish_alone(cluster: ClusterConfig) -> None:
    env = {"HF_TOKEN": "hf_secret", "PATH": "/bin", "APPTAINERENV_HF_TOKEN": "hf_secret"}
    env = env if cluster.container else {"HF_TOKEN": "hf_secret", "PATH": "/bin"}
    token = "hf_secret"
    for stage in ("prepare", "train", "infer", "collect"):
        assert "hf_secret" not in stage_environment(cluster, stage, env, token).values()
    assert "hf_secret" in stage_environment(cluster, "publish", env, token).values()


def test_a_refusal_names_the_key_to_change() -> None:
    said = "sbatch: error: invalid partition specified: nope"
    assert "train.partition" in str(refusal(Job("train"), said))
    assert isinstance(refusal(Job("train"), said), RequestError)
    down = "sbatch: error: Unable to contact slurm controller (connect failure)"
    assert isinstance(refusal(Job("train"), down), StageError)


def test_the_host_side_imports_nothing_heavy() -> None:
    modules = "cluster chain status supervisor executor local prepare train infer collect publish"
    code = "import sys\n" + "".join(f"import jobs.{m}\n" for m in modules.split())
    code += "print([m for m in ('torch','transformers','datasets','pandas','pyarrow','submitit')"
    code += " if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
