"""Where a user stands: an odd Python, something in its way, folders that refuse.

Each is a whole process as it is typed; it works, or says in one message what to do.
"""

from __future__ import annotations

import ast
import os
import re
import shutil
import subprocess
import sys
import zipapp
from pathlib import Path

import pytest

from yelp_hpc.config import load_config
from yelp_hpc.own_files import IMPORT_ROOT, PACKAGE
from yelp_hpc.rundir.manifest import record_run
from yelp_hpc.rundir.paths import WEIGHTS, RunPaths

RIGHTS = ["setpriv", "--bounding-set=-dac_override,-dac_read_search,-fowner"]
"""Takes from root what lets it write anywhere; nobody else has it."""


def typed(
    *arguments: str | Path, options: tuple[str, ...] = (), cwd: Path | None = None, **env: str
) -> tuple[int, str, str]:
    """Exit code, standard output and standard error of `python -m yelp_hpc`."""
    rights = RIGHTS if os.geteuid() == 0 else []
    done = subprocess.run(
        [*rights, sys.executable, *options, "-m", "yelp_hpc", *arguments],
        capture_output=True,
        text=True,
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": str(IMPORT_ROOT), **env},
    )
    assert "Traceback" not in done.stderr, done.stderr
    return done.returncode, done.stdout, " ".join(done.stderr.split())


@pytest.mark.parametrize("version", [(3, 6, 15), (3, 10, 13)])
def test_an_older_python_is_told_what_is_needed(version: tuple[int, ...]) -> None:
    for name in ("__init__.py", "__main__.py"):  # both are compiled before anything can be said
        tree = ast.parse((PACKAGE / name).read_text(encoding="utf-8"), feature_version=(3, 7))
        futures = [n for n in ast.walk(tree) if isinstance(n, ast.ImportFrom)]
        assert "__future__" not in {node.module for node in futures}, name
    code = f"import runpy, sys; sys.version_info = {version}; runpy.run_module('yelp_hpc')"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    said = f"needs Python 3.11 or newer, and {sys.executable} is {version[0]}.{version[1]}"
    assert done.returncode == 2 and said in done.stderr, done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("command", [[], ["submit"], ["image", "build"]])
def test_help_stands_where_docstrings_are_left_out(command: list[str]) -> None:
    helped = typed(*command, "--help")
    assert helped[0] == 0 and len(helped[1].splitlines()) > 10
    assert typed(*command, "--help", PYTHONOPTIMIZE="2") == helped
    assert typed(*command, "--help", options=("-OO", "-u")) == helped


def test_a_zip_archive_is_told_to_be_unpacked(tmp_path: Path) -> None:
    shutil.copytree(PACKAGE, tmp_path / "app" / "yelp_hpc")
    archive = tmp_path / "y.pyz"
    zipapp.create_archive(tmp_path / "app", archive, main="yelp_hpc.__main__:start")
    done = subprocess.run([sys.executable, archive], capture_output=True, text=True, env={})
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.endswith("unpack it, or install the package\n"), done.stderr


def test_exit_codes_hold_where_python_is_told_to_stay(tmp_path: Path) -> None:
    """PYTHONINSPECT would end a stage that is done, or saved, with 1."""
    assert typed("--version", PYTHONINSPECT="1")[0] == 0
    code, _, said = typed("status", "--run", str(tmp_path), PYTHONINSPECT="1")
    assert code == 2 and "is not a run directory" in said


def test_names_hold_in_a_locale_that_is_not_utf8(tmp_path: Path) -> None:
    (tmp_path / "naïve").mkdir()
    (tmp_path / "naïve" / "reviews.csv").write_text("label,text\n0,x\n")
    config = tmp_path / "naïve" / "c.yaml"
    config.write_text(f"model: {{path: {tmp_path}/naïve}}\ndata: {{source: hub, path: a/b}}\n")
    asked = ["submit", "all", "--executor", "local", "--config", str(config), "--run", "rün"]
    off = {"PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"}
    code, _, said = typed(*asked, options=(), cwd=tmp_path, LC_ALL="C", **off)
    assert (code, "naïve" in said) == (2, True), said  # it has no model, as in any other locale
    assert said == typed(*asked, cwd=tmp_path)[2]


@pytest.mark.parametrize(
    "command",
    [["status", "--run"], ["submit", "all", "--config", "demo", "--run"], ["compare", "x"]],
)
def test_a_name_that_is_no_utf8_is_refused(tmp_path: Path, command: list[str]) -> None:
    place = os.fsdecode(os.fsencode(tmp_path) + b"/r\xfc")
    os.mkdir(place)  # noqa: PTH102
    code, out, said = typed(*command, place)
    assert (code, out) == (2, "") and "r\\xfc' is no name in UTF-8" in said, said
    assert os.listdir(place) == []  # noqa: PTH208


@pytest.mark.parametrize("name", ["yaml", "random"])
def test_a_module_of_pythonpath_that_stands_in_the_way_is_named(tmp_path: Path, name: str) -> None:
    (tmp_path / f"{name}.py").write_text("mine = 1\n")
    path = f"{tmp_path}{os.pathsep}{IMPORT_ROOT}"
    code, out, said = typed("config", "show", "--config", "demo", PYTHONPATH=path)
    assert (code, out) == (2, "")
    assert said.startswith(f"{tmp_path / name}.py stands in the way"), said
    assert f"leave {tmp_path} out of PYTHONPATH" in said


def test_ctrl_c_while_it_is_imported_is_no_traceback(tmp_path: Path) -> None:
    (tmp_path / "yaml.py").write_text("raise KeyboardInterrupt\n")
    path = f"{tmp_path}{os.pathsep}{IMPORT_ROOT}"
    asked = ("config", "show", "--config", "demo")
    assert typed(*asked, PYTHONPATH=path) == (130, "", "interrupted")


def test_folders_of_our_names_on_pythonpath_are_in_nobodys_way(tmp_path: Path) -> None:
    for name in ("jobs", "configs", "tests", "containers", "share"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text("raise SystemExit(__file__)\n")
    path = f"{tmp_path}{os.pathsep}{IMPORT_ROOT}"
    assert typed("config", "show", "--config", "demo", PYTHONPATH=path)[0] == 0


def test_a_python_without_the_packages_is_told_how_they_are_installed(tmp_path: Path) -> None:
    python = tmp_path / "my venv" / "python"
    python.parent.mkdir()
    python.symlink_to(sys.executable)
    options = ("-S", "-m", "yelp_hpc", "--version")  # without site-packages
    env = {**os.environ, "PYTHONPATH": str(IMPORT_ROOT)}
    done = subprocess.run([python, *options], capture_output=True, text=True, env=env)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith(f"this needs the package click, which {python} does not have")
    assert f"\n  '{python}' -m pip install yelp-hpc\n" in done.stderr


@pytest.mark.parametrize("closed", ["<&-", ">&-", "2>&-", ">&- 2>&-", "| true", "2>&1 | true"])
def test_a_stream_that_is_closed_hinders_nothing(closed: str, tmp_path: Path) -> None:
    """The exit code is that of the work, and nothing is said of the pipe."""
    said = tmp_path / "said"
    shell = f"""{{ {sys.executable} -m yelp_hpc $0 {closed}; echo ${{PIPESTATUS[0]}}; }} 2>{said}"""
    env = {**os.environ, "PYTHONPATH": str(IMPORT_ROOT)}
    for command, code in (("config show --config demo", 0), ("config show --config nope", 2)):
        argv = ["bash", "-c", shell.replace("$0", command)]
        done = subprocess.run(argv, capture_output=True, text=True, env=env)
        piped = closed.endswith("true")
        assert int(done.stdout.split()[-1]) in ({code, 1} if piped else {code}), done.stdout
        assert "Exception" not in said.read_text() and "Traceback" not in said.read_text()


def test_a_process_that_ignores_its_children_still_learns_how_they_end() -> None:
    code = (
        "import os, signal, sys; signal.signal(signal.SIGCHLD, signal.SIG_IGN); "
        "os.execv(sys.executable, [sys.executable, *sys.argv[1:]])"
    )
    child = (
        "from yelp_hpc.runtime import undo_inherited; import subprocess; undo_inherited(); "
        "print(subprocess.run(['false']).returncode)"
    )
    argv = [sys.executable, "-c", code, "-c", child]
    env = {**os.environ, "PYTHONPATH": str(IMPORT_ROOT)}
    assert subprocess.run(argv, capture_output=True, text=True, env=env).stdout == "1\n"


def test_a_shared_library_that_the_shell_puts_in_the_way_is_named(tmp_path: Path) -> None:
    (tmp_path / "libgcc_s.so.1").write_text("of another system\n")
    code, out, said = typed("config", "show", "--config", "demo", LD_LIBRARY_PATH=str(tmp_path))
    assert (code, out) == (2, "") and "a library does not fit" in said, said
    assert str(tmp_path / "libgcc_s.so.1") in said and "unset LD_LIBRARY_PATH" in said


def test_a_variable_that_a_library_cannot_read_is_named(tmp_path: Path) -> None:
    options = ("submit", "all", "--config=demo", f"--run={tmp_path / 'r'}")
    code, _, said = typed(*options, HF_HUB_ETAG_TIMEOUT="10s")
    assert code == 2
    assert said.endswith("with base 10: '10s'): unset HF_HUB_ETAG_TIMEOUT, or mend it"), said
    assert not list(tmp_path.iterdir())


def test_packages_that_are_too_old_are_named(tmp_path: Path) -> None:
    """As of ~/.local, before those that were installed for us."""
    (tmp_path / "submitit-1.4.2.dist-info").mkdir()
    metadata = tmp_path / "submitit-1.4.2.dist-info" / "METADATA"
    metadata.write_text("Metadata-Version: 2.1\nName: submitit\nVersion: 1.4.2\n")
    asked = [
        "submit",
        "all",
        "--executor",
        "local",
        "--config",
        "demo",
        "--run",
        str(tmp_path / "r"),
    ]
    path = f"{tmp_path}{os.pathsep}{IMPORT_ROOT}"
    code, out, said = typed(*asked, PYTHONPATH=path)
    assert (code, out) == (2, "") and "too old: submitit 1.4.2 (1.5.3 is needed)" in said, said
    assert "-m pip install 'submitit>=1.5.3'" in said and not (tmp_path / "r").exists()


def test_a_shell_that_gives_too_little_memory_is_told(tmp_path: Path) -> None:
    (tmp_path / "r.csv").write_text("label,text\n" + "0,good\n1,bad\n" * 9)
    (tmp_path / "c.yaml").write_text(
        f"model: {{path: a/b}}\ndata: {{source: file, train: {tmp_path}/r.csv, test_rows: 4}}\n"
    )
    config = tmp_path / "c.yaml"
    record_run(tmp_path / "run", load_config(config), str(config), ())
    argv = [sys.executable, "-m", "yelp_hpc", "run", "prepare", "--run", str(tmp_path / "run")]
    limited = ["bash", "-c", 'ulimit -v 700000; exec "$@"', "-", *argv]
    env = {**os.environ, "PYTHONPATH": str(IMPORT_ROOT), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(limited, capture_output=True, text=True, env=env, cwd=tmp_path)
    assert done.returncode == 1 and "Traceback" not in done.stderr, done.stderr
    assert re.search(r"not enough memory.*\(ulimit -v: 716800000", done.stderr), done.stderr


def test_no_folder_for_temporary_files_is_said(tmp_path: Path) -> None:
    shell = ["bash", "-c", 'ulimit -f 0; exec "$@"', "-"]  # as a full disk: no byte is taken
    doctor = [sys.executable, "-m", "yelp_hpc", "doctor"]
    env = {**os.environ, "PYTHONPATH": str(IMPORT_ROOT)}
    done = subprocess.run([*shell, *doctor], capture_output=True, text=True, env=env, cwd=tmp_path)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert "TMPDIR, /tmp and /var/tmp cannot be written" in done.stderr, done.stderr
    assert "export TMPDIR=DIR" in done.stderr


def test_a_cache_that_may_only_be_read_is_one_message(tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    for name in ("image/locks", "data"):
        (cache / name).mkdir(parents=True)
        (cache / name).chmod(0o555)
    for command in (["image", "build", str(tmp_path / "x.sif")], ["fetch", "--config", "demo"]):
        code, _, said = typed(*command, YELP_HPC_CACHE=str(cache), HF_HUB_OFFLINE="1")
        assert code == 1, said
        assert f"{cache}/" in said and "export YELP_HPC_CACHE=DIR" in said, said


def test_a_checkout_without_its_large_files_is_told_to_fetch_them(tmp_path: Path) -> None:
    """Nothing is made again, and no figure is computed, where Git LFS left pointers."""
    config = IMPORT_ROOT / "configs" / "demo.yaml"
    pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 9\n"
    for name in ("split", "weights", "shard"):
        run = RunPaths(tmp_path / name)
        record_run(run.root, load_config(config), str(config), ())
        path = {
            "split": run.split("test"),
            "weights": run.adapter / WEIGHTS,
            "shard": run.shard("tuned", 0, 2),
        }[name]
        path.parent.mkdir(parents=True)
        path.write_text(pointer)
        before = sorted(run.root.rglob("*"))
        local = ["--executor", "local", "--config", str(config)]
        for command in (["status"], ["collect"], ["verify"], ["run", "train"]):
            code, out, said = typed(*command, "--run", str(run.root))
            assert (code, out) == (2, "") and f"{path} is a pointer of Git LFS" in said, said
            assert f"git -C {run.root} lfs pull" in said
        code, _, said = typed("submit", "all", *local, "--run", str(run.root))
        assert code == 2 and f"{path} is a pointer of Git LFS" in said, said
        assert sorted(run.root.rglob("*")) == before


def test_a_tilde_that_no_shell_expands_is_the_home_folder(tmp_path: Path) -> None:
    home = tmp_path / "home"
    home.mkdir()
    options = ("submit", "all", "--config=demo", "--run=~/r", "--dry-run")
    code, output, _ = typed(*options, cwd=tmp_path, HOME=str(home))
    assert code == 0
    assert f"--run {home}/r" in output


def test_what_only_reads_a_colleagues_run_is_said(tmp_path: Path) -> None:
    run = tmp_path / "run"
    record_run(run, load_config("demo"), "demo", [])
    run.chmod(0o555)
    code, _, said = typed("collect", "--run", run)
    assert code == 2 and "`verify`, `compare`, `predict` and `export` only read a run" in said
