"""publish with the real huggingface_hub client against a local server that speaks its protocol."""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from tests.hub.finished import BASE, REPO, finish_run, settings
from tests.hub.server import serving
from tests.hub.state import Fault, Hub
from yelp_hpc.config import Config
from yelp_hpc.errors import RequestError, StageError
from yelp_hpc.proof.verify import verify
from yelp_hpc.publishing.hub import Backoff
from yelp_hpc.publishing.token import Token, find_token, redact
from yelp_hpc.rundir.files import write_json
from yelp_hpc.rundir.paths import RunPaths
from yelp_hpc.stages import publish

ROOT = Path(__file__).resolve().parents[2]
SENTINEL = "hf_SENTINELsentinelSENTINEL12345678"
QUICK = Backoff(attempts=4, first=0.01, most=0.05)


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[RunPaths, Path]:
    folder = tmp_path_factory.mktemp("finished")
    return finish_run(folder / "run", folder / "model"), folder / "model"


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)  # read at import
    monkeypatch.setenv("HF_TOKEN", "good-token")
    with serving(Hub(tmp_path / "hub", chunk=3000)) as server:
        monkeypatch.setenv("HF_ENDPOINT", server.url)
        yield server


@pytest.fixture
def run(finished: tuple[RunPaths, Path], tmp_path: Path) -> RunPaths:
    shutil.copytree(finished[0].root, tmp_path / "run")
    return RunPaths(tmp_path / "run")


@pytest.fixture
def config(finished: tuple[RunPaths, Path]) -> Config:
    return settings(finished[1])


def test_one_private_commit_with_everything(hub: Hub, run: RunPaths, config: Config) -> None:
    publish.run(run, config, backoff=QUICK)
    files = hub.files(REPO)
    assert {
        "README.md", "adapter_config.json", "adapter_model.safetensors", "confusion.png",
        "loss.png", "metrics.json", "run.json", "tokenizer.json", "tokenizer_config.json",
    } <= set(files)  # fmt: skip
    weights = (run.adapter / "adapter_model.safetensors").read_bytes()
    assert files["adapter_model.safetensors"] == weights
    assert json.loads(files["adapter_config.json"])["base_model_name_or_path"] == BASE
    assert len(hub.history(REPO)) == 2  # the server's own first one, and ours
    state = hub.load(REPO)
    assert state is not None and state["private"]
    assert hub.count("POST /_complete/") >= 1  # the adapter is larger than a part
    published = json.loads(run.published.read_text())
    assert published["commit"] == state["refs"]["refs/heads/main"]
    assert published["url"] == f"{hub.url}/{REPO}"


def test_what_went_up_is_what_verify_finds_here(hub: Hub, run: RunPaths, config: Config) -> None:
    publish.run(run, config, backoff=QUICK)
    assert verify(run) == []
    record = json.loads(run.run_json.read_text())
    record["code"]["git_sha"] = "b" * 40  # nothing else tells which code it was
    write_json(run.run_json, record)
    (problem,) = verify(run)
    assert problem.startswith(f"{run.published}: run.json was published with another content")


def test_the_same_content_makes_no_second_commit(
    hub: Hub, run: RunPaths, config: Config, capfd: pytest.CaptureFixture[str]
) -> None:
    publish.run(run, config, backoff=QUICK)
    asked = len(hub.requests)
    publish.run(run, config, backoff=QUICK)
    assert len(hub.requests) == asked
    assert "already done" in capfd.readouterr().err
    run.published.unlink()
    publish.run(run, config, backoff=QUICK)
    assert len(hub.history(REPO)) == 2
    assert "has all of it already" in capfd.readouterr().err
    assert json.loads(run.published.read_text())["repo_id"] == REPO


def test_a_changed_file_alone_is_sent(hub: Hub, run: RunPaths, config: Config) -> None:
    publish.run(run, config, backoff=QUICK)
    stored = hub.count("PUT /_store/")
    run.loss_png.write_bytes(b"\x89PNG another")
    publish.run(run, config, backoff=QUICK)
    assert len(hub.history(REPO)) == 3
    assert hub.count("PUT /_store/") == stored + 1
    assert hub.files(REPO)["loss.png"] == b"\x89PNG another"


def test_a_file_that_is_gone_is_deleted_there(hub: Hub, run: RunPaths, config: Config) -> None:
    publish.run(run, config, backoff=QUICK)
    run.loss_png.unlink()
    publish.run(run, config, backoff=QUICK)
    assert "loss.png" not in hub.files(REPO)


def test_branch(hub: Hub, run: RunPaths, finished: tuple[RunPaths, Path]) -> None:
    publish.run(run, settings(finished[1], branch="run-1"), backoff=QUICK)
    assert len(hub.history(REPO)) == 1
    assert "README.md" in hub.files(REPO, "run-1")


def test_pull_request_is_opened_once(
    hub: Hub, run: RunPaths, finished: tuple[RunPaths, Path]
) -> None:
    config = settings(finished[1], pull_request=True)
    # The answer to the commit is lost: the retry must find the pull request that was made.
    hub.faults.append(Fault(r"POST /api/models/.*/commit/", after=True))
    publish.run(run, config, backoff=QUICK)
    state = hub.load(REPO)
    assert state is not None and [p["num"] for p in state["pulls"]] == [1]
    assert json.loads(run.published.read_text())["pull_request"].endswith("/discussions/1")
    assert "README.md" not in hub.files(REPO)
    assert "README.md" in hub.files(REPO, "refs/pr/1")


def test_merged_model_replaces_the_adapter(
    hub: Hub, run: RunPaths, finished: tuple[RunPaths, Path]
) -> None:
    publish.run(run, settings(finished[1]), backoff=QUICK)
    config = settings(finished[1], merged=True)
    local = config.model_copy(
        update={"model": config.model.model_copy(update={"path": str(finished[1])})}
    )
    publish.run(run, local, backoff=QUICK)
    files = hub.files(REPO)
    assert "model.safetensors" in files and "config.json" in files
    assert "adapter_config.json" not in files
    assert str(finished[1].parent).encode() not in files["README.md"]
    assert not list(run.root.glob(".merged-*"))


@pytest.mark.parametrize(
    "fault",
    [
        Fault(r"GET /api/models/me/stars$", 429, 2, {"Retry-After": "0"}),
        Fault(r"GET /api/models/", 500, 2),
        Fault(r"POST /api/repos/create", 503, 1),
        Fault(r"POST /api/repos/create", after=True),
        Fault(r"POST .*/preupload/", 500, 1),
        Fault(r"POST .*/objects/batch", 429, 1, {"Retry-After": "0"}),
        Fault(r"PUT /_store/\w+/2", 500, 1),
        Fault(r"PUT /_store/\w+/2", cut=700),
        Fault(r"PUT /_store/\w+$", cut=50),
        Fault(r"POST .*/commit/", 500, 2),
        Fault(r"POST .*/commit/", 409, 1),
        Fault(r"POST .*/commit/", cut=100),
        Fault(r"POST .*/commit/", after=True),
    ],
    ids=lambda f: (
        f"{f.match.split('/')[-1] or f.match}-{f.status or ('lost' if f.after else 'cut')}"
    ),
)
def test_faults_that_pass_are_outlived(
    hub: Hub, run: RunPaths, config: Config, fault: Fault
) -> None:
    fault.times = fault.times or 1
    before = fault.times
    hub.faults.append(fault)
    publish.run(run, config, backoff=QUICK)
    assert fault.times < before, "the fault was never met"
    assert len(hub.history(REPO)) == 2
    weights = (run.adapter / "adapter_model.safetensors").read_bytes()
    assert hub.files(REPO)["adapter_model.safetensors"] == weights


@pytest.mark.parametrize(
    ("fault", "kind", "words"),
    [
        (Fault(r"GET /api/models/", 401, 99), RequestError, "does not accept the token of the env"),
        (Fault(r"POST .*/preupload/", 403, 99), RequestError, "may not write to me/stars"),
        (Fault(r"POST .*/commit/", 404, 99), RequestError, "cannot be found"),
        (Fault(r"POST .*/commit/", 400, 99), RequestError, "the request is refused"),
        (Fault(r"POST .*/commit/", 409, 99), StageError, "others keep changing it"),
        (Fault(r"POST .*/commit/", 500, 99), StageError, "after 4 attempts"),
        (Fault(r"GET /api/models/", 429, 99, {"Retry-After": "7200"}), StageError, "7200 s"),
        (Fault(r"GET /api/models/", cut=0, times=99), StageError, "run publish again"),
    ],
)
def test_lasting_faults_are_one_clear_message(
    hub: Hub,
    run: RunPaths,
    config: Config,
    fault: Fault,
    kind: type[Exception],
    words: str,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("HF_TOKEN", SENTINEL)
    hub.tokens[SENTINEL] = {"user": "me", "write": True}
    fault.message = f"refused Bearer {SENTINEL}"  # a server that quotes what it was sent
    hub.faults.append(fault)
    with pytest.raises(kind) as caught:
        publish.run(run, config, backoff=QUICK)
    message = str(caught.value)
    assert words in message
    captured = capfd.readouterr()
    assert SENTINEL not in message + captured.err + captured.out
    assert not run.published.exists()
    hub.faults.clear()
    publish.run(run, config, backoff=QUICK)  # a second run finishes the job
    assert len(hub.history(REPO)) == 2


def test_a_wrong_token(
    hub: Hub, run: RunPaths, config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_wrongwrongwrong")
    with pytest.raises(RequestError, match="does not accept the token") as caught:
        publish.run(run, config, backoff=QUICK)
    assert "hf_wrongwrongwrong" not in str(caught.value)
    assert hub.count("POST /api/repos/create") == 0


def test_offline_mode_is_named(
    hub: Hub, run: RunPaths, config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(RequestError, match="HF_HUB_OFFLINE is set"):
        publish.run(run, config)


def test_a_token_that_may_not_write_there(
    hub: Hub, run: RunPaths, finished: tuple[RunPaths, Path]
) -> None:
    with pytest.raises(RequestError, match="may not write to others/stars"):
        publish.run(run, settings(finished[1], repo_id="others/stars"), backoff=QUICK)


def test_a_public_repository_is_not_given_what_is_private(
    hub: Hub, run: RunPaths, config: Config
) -> None:
    hub.create(REPO, private=False)
    with pytest.raises(RequestError, match=r"publish\.private"):
        publish.run(run, config, backoff=QUICK)
    assert len(hub.history(REPO)) == 1


def test_another_commit_meanwhile_is_kept(hub: Hub, run: RunPaths, config: Config) -> None:
    state = hub.create(REPO, private=True)
    meanwhile = {"note.txt": hub.put_blob(b"mine")}

    class Meanwhile(Fault):
        """Somebody else's commit between our look and our commit."""

    fault = Meanwhile(r"POST .*/preupload/", 500, 1)
    hub.faults.append(fault)
    original = hub.fault

    def commit_then_fault(request: str) -> Fault | None:
        found = original(request)
        if found is fault:
            head = state["refs"]["refs/heads/main"]
            files = {**state["commits"][head]["files"], **meanwhile}
            hub.commit(state, "refs/heads/main", files, "theirs", head)
            hub.save(REPO, state)
        return found

    hub.fault = commit_then_fault  # type: ignore[method-assign]
    publish.run(run, config, backoff=QUICK)
    assert hub.history(REPO)[1] == "theirs" and len(hub.history(REPO)) == 3
    assert hub.files(REPO)["note.txt"] == b"mine"


def test_without_a_repo_id_the_chain_ends_well(
    run: RunPaths, finished: tuple[RunPaths, Path], capfd: pytest.CaptureFixture[str]
) -> None:
    publish.run(run, settings(finished[1], repo_id=None))
    assert "repo_id is not set" in capfd.readouterr().err
    assert json.loads(run.published.read_text())["repo_id"] is None


def test_skipped_before_does_not_stop_a_later_publication(
    hub: Hub, run: RunPaths, config: Config, finished: tuple[RunPaths, Path]
) -> None:
    publish.run(run, settings(finished[1], repo_id=None))
    publish.run(run, config, backoff=QUICK)
    assert json.loads(run.published.read_text())["repo_id"] == REPO


def test_dry_run_shows_card_and_sizes_and_touches_nothing(
    hub: Hub,
    run: RunPaths,
    config: Config,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.delenv("HF_TOKEN")
    publish.run(run, config, dry_run=True)
    shown = capsys.readouterr().out
    assert shown.startswith("---\n") and "## Limitations" in shown
    size = (run.adapter / "adapter_model.safetensors").stat().st_size
    digest = hashlib.sha256((run.adapter / "adapter_model.safetensors").read_bytes()).hexdigest()
    assert f"{size:,} bytes  sha256:{digest}" in shown and "--- run.json" in shown
    assert f"to {REPO} at {hub.url} (private" in shown
    assert not hub.requests and not run.published.exists()


def test_an_unfinished_run_is_named(run: RunPaths, config: Config) -> None:
    run.metrics.unlink()
    (run.adapter / "adapter_config.json").write_text("{}")
    with pytest.raises(StageError) as caught:
        publish.run(run, config)
    assert "metrics.json is missing" in str(caught.value)
    assert "adapter_config.json" in str(caught.value)


def test_no_token_at_all(
    hub: Hub, run: RunPaths, config: Config, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from huggingface_hub import constants

    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "none"))
    with pytest.raises(RequestError, match="hf auth login"):
        publish.run(run, config)
    (tmp_path / "none").write_text("good-token\n")  # what `hf auth login` writes
    publish.run(run, config, backoff=QUICK)
    assert len(hub.history(REPO)) == 2


def test_token_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.delenv("HUGGING_FACE_HUB_TOKEN", raising=False)
    path = tmp_path / "token"
    path.write_text("hf_fromthefile\n")
    path.chmod(0o644)
    with pytest.raises(RequestError, match="chmod 600"):
        find_token(str(path))
    path.chmod(0o600)
    token = find_token(str(path))
    assert token is not None and token.secret == "hf_fromthefile"
    assert "hf_fromthefile" not in repr(token)
    path.write_text("two words")
    with pytest.raises(RequestError, match="cannot be a Hub token"):
        find_token(str(path))
    path.write_text("")
    with pytest.raises(RequestError, match="is empty"):
        find_token(str(path))
    with pytest.raises(RequestError, match="cannot be read"):
        find_token(str(tmp_path / "missing"))


def test_a_token_never_prints_nor_pickles(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "odd+token/42")
    with pytest.raises(TypeError):
        pickle.dumps(Token("secret", "a test"))
    shown = redact(f"odd+token/42 odd%2Btoken%2F42 Bearer abc {SENTINEL} x-secret", "x-secret")
    assert shown == "[token] [token] Bearer [token] [token] [token]"
    assert redact("nothing to hide at hf.co") == "nothing to hide at hf.co"


def test_a_token_in_a_file_is_refused(hub: Hub, run: RunPaths, config: Config) -> None:
    record = json.loads(run.run_json.read_text())
    write_json(run.run_json, {**record, "note": "good-token"})
    with pytest.raises(RequestError, match=r"run\.json holds the Hub token"):
        publish.run(run, config, backoff=QUICK)
    assert not hub.requests


def everything(hub: Hub) -> bytes:
    """Every byte that the Hub received and kept."""
    return b"".join(path.read_bytes() for path in hub.root.rglob("*") if path.is_file())


def test_secrets_paths_and_other_peoples_files_never_reach_the_hub(
    hub: Hub, run: RunPaths, config: Config, finished: tuple[RunPaths, Path], tmp_path: Path
) -> None:
    record = json.loads(run.run_json.read_text())
    diff = f"+token = '{SENTINEL}'\n+-----BEGIN RSA PRIVATE KEY-----\n+key AKIAQ3EGRTY7UIOPASDF\n"
    home = str(tmp_path / "home" / "somebody")
    record["code"] |= {"dirty": True, "diff": diff}
    record["config"]["overrides"] = [f"publish.token_file={home}/token"]
    record["note"] = f"{home} github_pat_11ABCDEFG0_abcdefghijklmnopqrst"
    write_json(run.run_json, record)
    publish.run(run, config, backoff=QUICK)
    received = everything(hub)
    for private in (SENTINEL, "PRIVATE KEY", "AKIA", "github_pat", home, str(run.root), "+token"):
        assert private.encode() not in received
    assert str(finished[1]).encode() not in received
    public = json.loads(hub.files(REPO)["run.json"])
    assert len(public["code"]["diff_sha256"]) == 64 and "diff" not in public["code"]


def test_a_diff_that_is_asked_for_is_searched_and_each_secret_named_by_its_line(
    hub: Hub, run: RunPaths, finished: tuple[RunPaths, Path]
) -> None:
    record = json.loads(run.run_json.read_text())
    wanted = settings(finished[1], include_diff=True)
    record["code"] |= {"dirty": True, "diff": "+a = 1\n+b = 'xoxb-1234567890-secretsecret'\n"}
    write_json(run.run_json, record)
    for dry_run in (True, False):
        with pytest.raises(RequestError, match=r"changes\.diff line 2: Slack token") as caught:
            publish.run(run, wanted, dry_run=dry_run, backoff=QUICK)
        assert "xoxb" not in str(caught.value)
    assert not hub.requests
    record["code"]["diff"] = "+a = 1\n"
    write_json(run.run_json, record)
    publish.run(run, wanted, backoff=QUICK)
    assert hub.files(REPO)["changes.diff"] == b"+a = 1\n"


def test_links_and_a_marker_that_leads_outside_are_refused_by_name(
    hub: Hub, run: RunPaths, config: Config, finished: tuple[RunPaths, Path], tmp_path: Path
) -> None:
    model = tmp_path / "copy"
    shutil.copytree(finished[1], model)
    record = json.loads(run.run_json.read_text())
    record["model"]["folder"] = str(model)
    write_json(run.run_json, record)
    key = tmp_path / "id_rsa"
    key.write_text("-----BEGIN OPENSSH PRIVATE KEY-----\n")
    (model / "vocab.txt").symlink_to(key)
    (model / "merges.txt").symlink_to("/etc/passwd")
    run.loss_png.unlink()
    run.loss_png.symlink_to(key)
    with pytest.raises(RequestError) as caught:
        publish.run(run, config, backoff=QUICK)
    for name in ("vocab.txt", "merges.txt", "loss.png"):
        assert name in str(caught.value)
    # a second name for the same file is no link that could be followed: its content tells
    for path in (run.loss_png, model / "vocab.txt"):
        path.unlink()
        path.hardlink_to(key)
    (model / "merges.txt").unlink()
    with pytest.raises(
        RequestError, match=r"loss\.png line 1: private key\n.*vocab\.txt line 1: pr"
    ):
        publish.run(run, config, backoff=QUICK)
    marker = json.loads((run.adapter / "complete.json").read_text())
    marker["files"]["/etc/passwd"] = "0" * 64
    write_json(run.adapter / "complete.json", marker)
    with pytest.raises(StageError, match=r"names '/etc/passwd', outside of its folder"):
        publish.run(run, config, backoff=QUICK)
    assert not hub.requests


# In a process of its own


def child(hub: Hub, home: Path, token: str = SENTINEL) -> dict[str, str]:
    hub.tokens[token] = {"user": "me", "write": True}
    kept = {k: v for k, v in os.environ.items() if not k.startswith("HF_")}
    return {
        **kept,
        "HF_ENDPOINT": hub.url,
        "HF_HUB_DISABLE_XET": "1",
        "HF_HOME": str(home),
        "HF_TOKEN": token,
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(ROOT),
    }


def start(run: RunPaths, environment: dict[str, str], **kwargs: Any) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "yelp_hpc", "run", "publish", "--run", str(run.root)]
    return subprocess.Popen(command, env=environment, cwd=run.root, **kwargs)


def command_lines() -> bytes:
    found = b""
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            found += path.read_bytes() + b"\n"
        except OSError:
            continue
    return found


def test_the_token_is_written_nowhere(hub: Hub, run: RunPaths, tmp_path: Path) -> None:
    stall = Fault(r"PUT /_store/\w+/2", cut=500, stall=3.0)
    late = Fault(r"POST .*/commit/", 500, 1, message=f"we got Bearer {SENTINEL}")
    hub.faults += [stall, late]
    home = tmp_path / "home"
    with (tmp_path / "log").open("wb") as log:
        process = start(run, child(hub, home), stdout=log, stderr=log)
        listed = b""
        while process.poll() is None:
            listed += command_lines()
            time.sleep(0.2)
    shown = (tmp_path / "log").read_text()
    assert process.returncode == 0, shown
    assert stall.times == 0 and late.times == 0
    assert str(run.root).encode() in listed  # the process was among those looked at
    assert SENTINEL.encode() not in listed
    written = [p for p in tmp_path.rglob("*") if p.is_file()]
    assert any(p.name == "published.json" for p in written)
    assert [p for p in written if SENTINEL.encode() in p.read_bytes()] == []


def test_killed_in_the_middle_of_a_part_the_second_run_finishes(
    hub: Hub, run: RunPaths, tmp_path: Path
) -> None:
    stall = Fault(r"PUT /_store/\w+/2", cut=500, stall=2.0)
    hub.faults.append(stall)
    environment = child(hub, tmp_path / "home")
    process = start(run, environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while stall.times and time.monotonic() < deadline:
        time.sleep(0.05)
    process.kill()
    process.wait()
    assert stall.times == 0
    assert len(hub.history(REPO)) == 1 and not run.published.exists()
    second = start(run, environment)
    assert second.wait(timeout=120) == 0
    assert len(hub.history(REPO)) == 2


def test_the_snippet_runs_as_pasted_and_predicts_the_same(
    hub: Hub, run: RunPaths, config: Config, finished: tuple[RunPaths, Path], tmp_path: Path
) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    base = hub.create(BASE, private=False)
    head = base["refs"]["refs/heads/main"]
    files = {p.name: hub.put_blob(p.read_bytes()) for p in finished[1].iterdir() if p.is_file()}
    hub.commit(base, "refs/heads/main", files, "base", head)
    hub.save(BASE, base)
    publish.run(run, config, backoff=QUICK)
    card = hub.files(REPO)["README.md"].decode()
    snippet = card.split("```python\n")[1].split("```")[0]
    test = pq.read_table(run.split("test"), columns=["row", "text"]).to_pylist()
    more = (
        f"\nimport json\ntexts = {[row['text'] for row in test]!r}\n"
        "print(json.dumps([rating(text) for text in texts]))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", snippet + more],
        env=child(hub, tmp_path / "home"),
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    shards = [
        pq.read_table(run.shard("tuned", k, 2), columns=["row", "prediction"]) for k in (0, 1)
    ]
    predicted = {r["row"]: r["prediction"] for r in pa.concat_tables(shards).to_pylist()}
    answers = json.loads(done.stdout.splitlines()[-1])
    assert answers == [predicted[row["row"]] for row in test]
    assert len(set(answers)) > 1
    assert hub.count(f"GET /{REPO}/resolve/.*adapter_model.safetensors") >= 1


def changed(path: Path, *keys: str, value: object) -> None:
    """A leaf of a JSON file, replaced."""
    whole = inner = json.loads(path.read_text())
    for key in keys[:-1]:
        inner = inner[key]
    inner[keys[-1]] = value
    write_json(path, whole)


@pytest.mark.parametrize("value", [None, 3, "text", [1], {"a": {}}, [[]], True], ids=str)
@pytest.mark.parametrize(
    "keys",
    [
        ("models",),
        ("models", "tuned"),
        ("models", "tuned", "confusion"),
        ("models", "tuned", "per_class"),
        ("models", "tuned", "f1"),
        ("task",),
        ("test",),
    ],
    ids=".".join,
)
def test_metrics_of_another_shape_are_one_message(
    run: RunPaths, config: Config, keys: tuple[str, ...], value: object
) -> None:
    """Never a traceback of publish; verify says of each that it is not what the shards give."""
    changed(run.metrics, *keys, value=value)
    with suppress(StageError):  # what the card does not need is verify's to find
        publish.run(run, config, dry_run=True)
    problems = verify(run)
    assert [p for p in problems if p.startswith(f"{run.metrics}: {keys[0]}")], problems
    assert max(map(len, problems)) < 500


@pytest.mark.parametrize(
    "value", [[], 3, {"repo_id": REPO, "files": 3}, {"repo_id": REPO}], ids=str
)
def test_a_record_of_another_shape_is_one_message(run: RunPaths, value: object) -> None:
    write_json(run.published, value)
    assert [p for p in verify(run) if p.startswith(str(run.published))]
