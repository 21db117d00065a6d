"""The login node: the host's part alone, installed from the wheel, in a folder without a clone.

A virtual environment as docs/cluster.md makes it: no torch, numpy or pyarrow. Every command works,
goes on in the image, or says in one message what to do.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterable, Iterator
from pathlib import Path

import pytest

from tests.fabricated import make_run
from tests.test_docs import ALL, TOOLS
from tests.tiny import SIF
from yelp_hpc.cli.job_side import go_on_in_image
from yelp_hpc.jobs.cluster import ClusterConfig
from yelp_hpc.jobs.snapshot import freeze_settings
from yelp_hpc.own_files import IMPORT_ROOT, package_files
from yelp_hpc.rundir.files import append_jsonl, write_marker
from yelp_hpc.rundir.paths import RunPaths
from yelp_hpc.stages.collect import collect


@pytest.fixture(scope="session")
def host_only(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`bin` of a virtual environment with the wheel and what it requires.

    Of the Python that YELP_HPC_HOST_PYTHON names, a login node's own; else of this one.
    """
    python = os.environ.get("YELP_HPC_HOST_PYTHON", sys.executable)
    folder = tmp_path_factory.mktemp("host")
    for name in [*package_files(), *map(Path, ("pyproject.toml", "README.md"))]:
        (folder / "tree" / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(IMPORT_ROOT / name, folder / "tree" / name)
    subprocess.run([python, "-m", "venv", folder / "venv"], check=True)
    bin_folder = folder / "venv" / "bin"
    install = [str(bin_folder / "pip"), "install", "--quiet", str(folder / "tree")]
    done = subprocess.run(install, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    shutil.rmtree(folder / "tree")
    for tool in TOOLS:
        if not (bin_folder / tool).exists():
            (bin_folder / tool).symlink_to(shutil.which(tool) or "/missing")
    return bin_folder


class Login:
    """A shell on the login node: its own HOME, no Slurm, no Apptainer, no clone."""

    def __init__(self, bin_folder: Path, home: Path) -> None:
        self.bin, self.home = bin_folder, home

    def type(self, line: str, path: Iterable[str] = (), closed: bool = False) -> tuple[int, str]:
        """Exit code and all that is printed.

        Args:
            path: what stands on PATH before `bin`.
            closed: folders that may not be entered are closed to root, too.
        """
        keep = ("LANG", "LC_ALL", "SSL_CERT_FILE", "PIP_INDEX_URL", "PIP_CONFIG_FILE")
        env = {key: os.environ[key] for key in keep if key in os.environ}
        env |= {
            "PATH": ":".join([*path, str(self.bin)]),
            "HOME": str(self.home),
            "HF_HUB_OFFLINE": "1",
        }
        rights = [shutil.which("setpriv") or "", "--bounding-set=-dac_override,-dac_read_search"]
        as_user = rights if closed and os.geteuid() == 0 else []
        done = subprocess.run(
            [*as_user, self.bin / "bash", "-c", line],
            cwd=self.home,
            env=env,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            text=True,
        )
        return done.returncode, done.stdout


@pytest.fixture
def login(host_only: Path, tmp_path: Path) -> Iterator[Login]:
    tool = host_only / "apptainer"
    tool.unlink(missing_ok=True)
    yield Login(host_only, tmp_path)
    tool.unlink(missing_ok=True)


def test_every_python_that_the_host_part_supports_is_said() -> None:
    project = tomllib.loads((IMPORT_ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    said = [c.rpartition(" ")[2] for c in project["classifiers"] if "Python :: 3." in c]
    assert said == ["3.11", "3.12", "3.13"] and project["requires-python"] == ">=3.11"
    page = (IMPORT_ROOT / "docs" / "cluster.md").read_text(encoding="utf-8")
    assert "Python 3.11, 3.12 or 3.13" in page
    workflow = (IMPORT_ROOT / ".github" / "workflows" / "tests.yml").read_text(encoding="utf-8")
    assert "YELP_HPC_HOST_PYTHON" in workflow and '"3.13"' in workflow


def test_nothing_of_the_job_side_is_installed(login: Login) -> None:
    for name in ("torch", "numpy", "pyarrow", "transformers", "datasets"):
        assert login.type(f"python -c 'import {name}'")[0] == 1, name
    assert login.type("python -c 'import huggingface_hub'")[0] == 0


def trained(login: Login) -> RunPaths:
    """A finished run in `run`."""
    paths, config = make_run(login.home / "run", rows=50)
    collect(paths, config)
    record = json.loads(paths.run_json.read_text())
    paths.run_json.write_text(json.dumps({**record, "model": {"folder": str(login.home)}}))
    paths.adapter.mkdir()
    (paths.adapter / "adapter_model.safetensors").write_bytes(b"weights")
    (paths.adapter / "adapter_config.json").write_text("{}")
    write_marker(paths.adapter, ["adapter_model.safetensors", "adapter_config.json"])
    return paths


def files(login: Login) -> list[Path]:
    """Everything there but downloads."""
    return sorted(path for path in login.home.rglob("*") if ".cache" not in path.parts)


IN_IMAGE = "In the image: apptainer exec yelp_hpc.sif python -m yelp_hpc "
BOTH_WAYS = (IN_IMAGE, "pip install 'yelp-hpc[job,demo]'")
SUBMIT = "--config demo --set infer.shards=3"


@pytest.mark.parametrize(
    ("line", "code", "expected"),
    [
        ("collect --run run", 2, BOTH_WAYS),
        ("collect --run run --json", 2, BOTH_WAYS),
        ("verify --run run", 2, BOTH_WAYS),
        ("publish --run run --dry-run", 2, BOTH_WAYS),
        ("export --run run --merged --out model", 2, BOTH_WAYS),
        ("plan --config demo --probe", 2, BOTH_WAYS),
        ("run infer --run run --model base", 2, BOTH_WAYS),
        ("fetch --config demo", 2, BOTH_WAYS),
        ("reproduce --from run --run run --compare", 2, BOTH_WAYS),
        ("reproduce --from run --run again", 0, ("yelp-hpc submit all --config",)),
        ("study configs/studies/seeds.yaml --config demo --out s --dry-run", 0, ("01-seed1",)),
        (f"submit all {SUBMIT} --run new --executor local", 2, ("no pyarrow", "container.image")),
        (f"submit all {SUBMIT} --run new --dry-run", 2, ("no pyarrow", "container.image")),
        ("demo", 2, ("no pyarrow", "pip install 'yelp-hpc[job,demo]'")),
        ("fetch --config yelp_chatglm3", 1, ("not in the cache",)),
        ("doctor", 1, ("failure job side", "no pyarrow", "container: {image:")),
        ("init", 2, ("no Slurm on this machine", "yelp-hpc demo")),
        ("plan --config yelp_chatglm3 --gpu rtx3090", 0, ("GPU",)),
        ("status --run run", 0, ("infer-tuned", "done")),
        ("logs --run run", 2, ("no log",)),
        ("cancel --run run", 0, ("nothing to cancel",)),
        ("config show --config configs/demo.yaml", 0, ("share/configs/demo.yaml:4",)),
        ("compare gone", 2, ("gone is not a run directory",)),
        ("image build x.sif", 2, ("apptainer is not on PATH",)),
        ("image check x.sif", 2, ("x.sif",)),
        ("completion bash", 0, ("complete",)),
        ("--version", 0, ("version",)),
        ("--help", 0, ("yelp-hpc demo", "Exit codes")),
        ("submit --help", 0, ("yelp-hpc submit all",)),
    ],
)
def test_each_command_works_or_says_what_to_do(
    login: Login, line: str, code: int, expected: tuple[str, ...]
) -> None:
    trained(login)
    before = files(login)
    done, output = login.type(f"yelp-hpc {line}")
    assert done == code, output
    flat = " ".join(output.split())
    assert "Traceback" not in output and all(word in flat for word in expected), output
    assert "python -m yelp_hpc" not in output.replace("exec yelp_hpc.sif python", "")
    if code:
        assert files(login) == before


def test_odd_entries_of_path_are_passed_over(login: Login) -> None:
    """A folder that may not be entered, a file, a link to nowhere, nothing, what is not there."""
    trained(login)
    (login.home / "x.sif").write_bytes(SIF)
    (login.home / "closed").mkdir(mode=0)
    (login.home / "file").write_text("")
    (login.home / "link").symlink_to("nowhere")
    odd = [*(str(login.home / name) for name in ("closed", "file", "link")), "", "/no/such"]
    assert login.type("ls closed", closed=True)[0] != 0
    for line, code, expected in (
        ("doctor", 1, "no Slurm client on PATH"),
        ("submit all --config demo --run new", 2, "no pyarrow"),
        ("submit all --config demo --run new --executor local", 2, "no pyarrow"),
        ("status --run run", 0, "infer-tuned"),
        ("cancel --run run", 0, "nothing to cancel"),
        ("image check x.sif", 2, "apptainer is not on PATH"),
        ("init", 2, "no Slurm on this machine"),
    ):
        done, output = login.type(f"yelp-hpc {line}", odd, closed=True)
        assert done == code and expected in " ".join(output.split()), f"{line}\n{output}"
        assert "Traceback" not in output
    (login.bin / "apptainer").write_text("no program")
    (login.bin / "apptainer").chmod(0o755)
    done, output = login.type("yelp-hpc image check x.sif")
    assert done == 1 and "apptainer cannot be started: Exec format error" in output


def test_what_needs_the_job_side_goes_on_in_the_image(login: Login) -> None:
    """A fake apptainer shows its arguments: the run's image, the folders, the same command."""
    image = login.home / "yelp_hpc.sif"
    image.write_bytes(SIF)
    (login.bin / "apptainer").write_text('#!/bin/sh\nprintf "%s\\n" "$@"; env | grep TOKEN\n')
    (login.bin / "apptainer").chmod(0o755)
    (login.home / "cluster.yaml").write_text("container: {image: yelp_hpc.sif, cache: cache}\n")
    run = trained(login)
    container = {"container": {"image": str(image), "cache": str(login.home / "cache")}}
    cluster = ClusterConfig.model_validate(container).model_dump(mode="json")
    frozen = freeze_settings(run, {"cluster": cluster, "image_sha256": None})
    line = {"name": "train", "job": "1", "executor": "slurm", "cluster": frozen.name}
    append_jsonl(run.submissions, line)
    for typed in (
        "verify --run run",
        "export --run run --merged --out out",
        "fetch --config demo --cluster cluster.yaml",
    ):
        code, output = login.type(f"HF_TOKEN=hf_secretsecret yelp-hpc {typed}")
        words = output.splitlines()
        assert code in (0, 1) and f"going on in {image}" in output, output
        assert words[words.index(str(image)) :][: 4 + len(typed.split())] == [
            *(str(image), "python", "-m", "yelp_hpc"),
            *typed.split(),
        ]
        assert str(login.home) in words and "secretsecret" not in output
    code, output = login.type("HF_TOKEN=hf_secretsecret yelp-hpc publish --run run --dry-run")
    assert "APPTAINERENV_HF_TOKEN=hf_secretsecret" in output
    assert "hf_secretsecret" not in output.replace("APPTAINERENV_HF_TOKEN=hf_secretsecret", "")


def test_a_tilde_is_the_home_folder_of_who_goes_into_the_image(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No shell reads the one in `--run=~/x`. The cache is made, which could not be bound else."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    for name in ("APPTAINER_CONTAINER", "SINGULARITY_CONTAINER"):
        monkeypatch.delenv(name, raising=False)
    (tmp_path / "apptainer").touch(0o755)
    (tmp_path / "x.sif").write_bytes(SIF)
    (tmp_path / "cluster.yaml").write_text("container: {image: ~/x.sif, cache: ~/cache}\n")
    monkeypatch.setattr(os, "execvpe", lambda name, argv, env: sys.exit(shlex.join(argv)))
    with pytest.raises(SystemExit) as started:
        typed = ["collect", "--run=~/run", "--cluster", "~/cluster.yaml"]
        go_on_in_image(ModuleNotFoundError(name="torch"), typed)
    assert f"--bind {tmp_path}/run " in str(started.value) and "~" not in str(started.value)
    assert (tmp_path / "cache").is_dir()


def typed_on_the_login_node() -> list[str]:
    """Every command of the page that sets a cluster up, and of the README's first screens."""
    lines = []
    for block in ALL:
        if block.page in ("docs/cluster.md", "README.md"):
            for line in re.sub(r"\\\n\s*", " ", block.text).splitlines():
                found = re.match(r"(?:\$ )?((?:python -m yelp_hpc|yelp-hpc) .*)", line)
                if found and "…" not in line:
                    lines.append(shlex.join(shlex.split(found[1], comments=True)))
    return list(dict.fromkeys(lines))


def test_no_command_of_the_pages_ends_in_a_traceback(login: Login) -> None:
    lines = typed_on_the_login_node()
    assert len(lines) >= 15
    config = {"model": {"path": "demo:smollm2-135m"}, "data": {"source": "demo"}}
    (login.home / "config.yaml").write_text(json.dumps(config))
    (login.home / "cluster.yaml").write_text("container: {image: yelp_hpc.sif}\n")
    for line in lines:
        words = shlex.split(line)
        given = {"FILE": "config.yaml", "DIR": "runs/yelp"}
        code, output = login.type(shlex.join(given.get(word, word) for word in words))
        assert "Traceback" not in output and code in (0, 1, 2), f"{line}\n{output}"
        assert "no such option" not in output.lower(), f"{line}\n{output}"


def test_predict_looks_at_plain_text_without_pyarrow(login: Login) -> None:
    run = trained(login)
    asked = "yelp-hpc predict --run run --input new.csv --out out.csv"
    (login.home / "new.csv").write_text("id,text\n1,good\n2,\n")
    code, output = login.type(asked)
    assert code == 2 and "line 3: text is empty" in output
    (login.home / "new.csv").write_text("id,text\n1,good\n2,bad\n")
    code, output = login.type(asked)
    assert code == 2 and "no pyarrow" in output and "container.image" in output
    assert not run.predict.exists() and not (login.home / "out.csv").exists()
