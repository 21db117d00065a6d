"""What would be submitted: scripts, packing, dependencies, commands and who gets which secret."""

from __future__ import annotations

import csv
import shlex
import subprocess
import sys
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import pytest
from pydantic import ValidationError

from tests.jobs.fake_run import FakeRun
from yelp_hpc.config import Config, ModelConfig
from yelp_hpc.errors import RequestError, StageError
from yelp_hpc.jobs.chain import plan, submit
from yelp_hpc.jobs.cluster import ClusterConfig
from yelp_hpc.jobs.container import command, stage_argv, stage_environment, with_inputs
from yelp_hpc.jobs.job import Job, pack
from yelp_hpc.jobs.site.refusals import refusal
from yelp_hpc.rundir.attempts import task_of, task_text
from yelp_hpc.rundir.paths import RunPaths

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
    tasks = pack(range(shards), limit)
    assert [shard for task in tasks for shard in task] == list(range(shards))
    assert len(tasks) <= limit
    assert max(map(len, tasks), default=0) - min(map(len, tasks), default=0) <= 1


@pytest.mark.parametrize(
    ("task", "text"), [((), ""), ((3,), "3"), ((0, 1, 2, 5), "0-2,5"), ((7, 9), "7,9")]
)
def test_a_task_is_spelled_one_way_and_read_in_any(task: tuple[int, ...], text: str) -> None:
    assert task_text(task) == text
    assert task_of(text) == task_of(", ".join(map(str, reversed(task)))) == task
    assert stage_argv("infer", Path("r"), "base", task)[5:] == (["--shard", text] if task else [])


@pytest.mark.parametrize("text", ["-1", "2-1", "0-", ",", "1,,2", "x", "0-9999999", "1.0", "²"])
def test_what_names_no_shards_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="no shard's number"):
        task_of(text)


def test_only_missing_shards_are_planned(fake_run: MakeRun) -> None:
    run = fake_run(shards=6, cluster={"max_array_size": 2})
    for shard in (0, 3):
        path = RunPaths(run.root).shard("base", shard, 6)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"")
    jobs = plan("infer", run.config, RunPaths(run.root), run.cluster)
    assert [job.tasks for job in jobs] == [((1, 2), (4, 5)), ((0, 1, 2), (3, 4, 5))]


def test_dry_run_prints_scripts_that_bash_reads_and_submits_nothing(
    fake_run: MakeRun, capsys: pytest.CaptureFixture[str]
) -> None:
    evil = "x; touch $(pwd)/pwned #"
    cluster = {
        "defaults": {"partition": evil, "gpus": 4, "gpu_type": "rtx3090", "time": "2-0"},
        "train": {"nodes": 2, "sbatch": {"gres": "lscratch:100"}},
    }
    run = fake_run("a run", cluster=cluster)
    made = submit("all", run.root, run.config, run.cluster, dry_run=True)
    train = made[1].script
    assert "#SBATCH --gres=gpu:rtx3090:4,lscratch:100\n" in train
    assert "#SBATCH --nodes=2" in train
    assert "#SBATCH --signal=USR2@120" in train
    assert f"#SBATCH --partition={shlex.quote(evil)}" in train
    assert "--array=0-2%3" in made[2].script
    assert shlex.quote(str(run.root / "code" / "DIGEST")) in train
    assert subprocess.run(["bash", "-n"], input=train, text=True, check=False).returncode == 0
    assert made[1].command in capsys.readouterr().out
    assert not (run.root / "submissions.jsonl").exists()


@pytest.mark.parametrize(
    ("changes", "train", "infer", "key"),
    [
        ({}, {"gpus": 4}, {}, "infer.precision=fp32"),
        ({}, {}, {"gpus": 1}, "infer.precision=bf16"),
        ({}, {"sbatch": {"gpus-per-task": "1"}}, {}, "infer.precision=fp32"),
        ({}, {"gpus": 4}, {"gpus": 1}, ""),
        ({"train": {"precision": "bf16"}}, {"gpus": 4}, {}, ""),
        ({"infer": {"precision": "fp32"}}, {"gpus": 4}, {}, ""),
        ({"infer": {"models": ["tuned"]}}, {"gpus": 4}, {}, ""),
    ],
)
def test_a_base_model_that_would_be_asked_in_another_precision_is_said_beforehand(
    fake_run: MakeRun,
    changes: dict[str, object],
    train: dict[str, object],
    infer: dict[str, object],
    key: str,
) -> None:
    run = fake_run(cluster={"train": train, "infer": infer})
    config = Config.model_validate({**run.config.model_dump(), **changes})
    said: list[str] = []
    submit("all", run.root, config, run.cluster, dry_run=True, say=said.append)
    assert [line.partition("--set ")[2] for line in said] == ([key] if key else [])


@pytest.mark.parametrize("name", ["a%j", "a:b", "a$(x)", "a\nb", "a'b"])
def test_names_that_slurm_or_a_shell_would_read_are_refused(name: str, fake_run: MakeRun) -> None:
    run = fake_run()
    with pytest.raises(RequestError, match="holds"):
        submit("all", run.root.parent / name, run.config, run.cluster, dry_run=True)


def container(**more: object) -> ClusterConfig:
    given = {"image": "/i.sif", "nv": True, "env": ["MINE"], "binds": ["/data:/data:ro"]}
    return ClusterConfig.model_validate({"container": {**given, "cache": "/room", **more}})


def test_only_what_is_named_enters_the_image() -> None:
    env = {"MINE": "key", "PYTHONPATH": "/x", "LD_LIBRARY_PATH": "/y", "HF_TOKEN": "hf_secret"}
    argv = command(container(), Path("/run"), stage_argv("infer", Path("/run"), "base", (3,)), env)
    text = shlex.join(argv)
    assert argv[:3] == ["apptainer", "exec", "--cleanenv"]
    assert "--nv" in argv
    assert "--bind /data:/data:ro" in text
    assert text.endswith("yelp_hpc run infer --run /run --model base --shard 3")
    # the user's own values stay out of the process list
    for absent in ("PYTHONPATH", "LD_LIBRARY_PATH", "hf_secret", "key"):
        assert absent not in text
    theirs = {"APPTAINERENV_X": "1", "APPTAINER_BIND": "/opt", "SINGULARITY_BINDPATH": "/nope"}
    handed = stage_environment(container(), "infer", {**env, **theirs}, None)
    assert not handed.keys() & theirs.keys()
    assert {n: v for n, v in handed.items() if n.startswith("APPTAINERENV_")} == {
        "APPTAINERENV_MINE": "key"
    }


def test_each_variable_is_one_to_apptainer() -> None:
    """It reads `A=b=c,d` as csv (apptainer/apptainer#1152), and NCCL's `=` means this very name."""
    lists = {"NCCL_IB_HCA": "=mlx5_0:1,mlx5_1:1", "NCCL_SOCKET_IFNAME": '=ib0,"x",ib1'}
    env = {**lists, "CUDA_VISIBLE_DEVICES": "0,1", "TMPDIR": "."}
    argv = command(container(), Path("/run"), ["prepare"], env)
    given = [value for option, value in pairwise(argv) if option == "--env"]
    read = [next(csv.reader([value])) if value.count("=") > 1 else [value] for value in given]
    assert {*map(len, read)} == {1}
    found = dict(value.split("=", 1) for (value,) in read)
    assert found.items() >= {**lists, "CUDA_VISIBLE_DEVICES": "0,1"}.items()
    assert "TMPDIR" not in found  # it has no place in the image


def test_what_libraries_cache_goes_where_the_site_has_room() -> None:
    argv = command(container(), Path("/run"), ["prepare"], {"HF_HOME": "/home/me/hf"})
    values = dict(word.split("=", 1) for word in argv if "=" in word)
    for name in ("YELP_HPC_CACHE", "HF_HOME", "TRITON_CACHE_DIR"):
        assert Path(values[name]).is_relative_to("/room")
    assert "--bind /room" in shlex.join(argv)
    assert stage_environment(container(), "train", {}, None) == {
        "APPTAINER_CACHEDIR": "/room/apptainer"
    }
    site = stage_environment(container(), "train", {"APPTAINER_CACHEDIR": "/site"}, None)
    assert site["APPTAINER_CACHEDIR"] == "/site"


def test_paths_of_the_container_are_absolute_and_tokens_are_no_variables_of_it(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    made = container(image="i.sif", cache="room").container
    assert made is not None
    assert (made.image, made.cache) == (f"{tmp_path}/i.sif", f"{tmp_path}/room")
    with pytest.raises(ValidationError, match="publish alone"):
        container(env=["HF_TOKEN"])
    with pytest.raises(ValidationError, match="separate binds"):
        container(cache="/a,b")


def test_model_and_data_outside_the_run_are_bound_read_only(tmp_path: Path) -> None:
    blobs, model, run = tmp_path / "blobs", tmp_path / "model", tmp_path / "run"
    for folder in (blobs, model, run):
        folder.mkdir()
    (blobs / "weights").write_text("x")
    (model / "model.safetensors").symlink_to(blobs / "weights")
    data = {"source": "file", "train": str(tmp_path / "a.csv"), "test": str(run / "b.csv")}
    config = Config.model_validate({"model": {"path": str(model)}, "data": data})
    bound = with_inputs(container(), config, run).container
    assert bound is not None
    wanted = [model, blobs, tmp_path / "a.csv"]
    assert bound.binds == ("/data:/data:ro", *(f"{p}:{p}:ro" for p in wanted))
    again = with_inputs(container(binds=[str(tmp_path)]), config, run).container
    assert again is not None
    assert again.binds == (str(tmp_path),)
    colon = config.model_copy(update={"model": ModelConfig(path=str(tmp_path / "a:b"))})
    with pytest.raises(RequestError, match="a:b"):
        with_inputs(container(), colon, run)
    assert with_inputs(ClusterConfig(), colon, run) == ClusterConfig()


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
