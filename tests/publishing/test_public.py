"""What may leave the machine: the kinds of secrets that are found, and the public record."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from tests.tiny import tiny_config
from yelp_hpc.config import config_from_dict
from yelp_hpc.publishing.public import (
    allowed_folders,
    leads_outside,
    public_config,
    public_record,
    without_local_keys,
)
from yelp_hpc.publishing.secrets import find_secrets

LETTERS = "aB3dE5gH7jK9mN1pQ3sT5vW7yZ9bC1eF3hJ5"  # 36 characters of a made-up secret
SECRETS = {
    "Hugging Face token": f"hf_{LETTERS[:34]}",
    "AWS access key": "AKIAQ3EGRTY7UIOPASDF",
    "GitHub token": f"ghp_{LETTERS}",
    "GitHub token ": f"github_pat_11ABCDEFG0_{LETTERS}",
    "GitLab token": f"glpat-{LETTERS[:20]}",
    "private key": "-----BEGIN OPENSSH PRIVATE KEY-----",
    "private key ": "-----BEGIN PRIVATE KEY-----",
    "Slack token": "xoxb-123456789012-abcdefABCDEF",
    "OpenAI or Anthropic key": f"sk-proj-{LETTERS}",
    "Google key": f"AIza{LETTERS[:35]}",
    "Stripe key": f"sk_live_{LETTERS[:24]}",
    "npm token": f"npm_{LETTERS}",
    "JSON web token": "eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiIxMjM0NTY3In0.SflKxwRJSMeKKF2QT4",
    "password in a URL": "postgresql://admin:hunter2@db.example.org/reviews",
    "assigned secret": "password = 'tr0ub4dor&3x'",
    "assigned secret ": f'"api_key": "{LETTERS[:20]}"',
    "assigned secret  ": f"WANDB_API_KEY={LETTERS}",
    "assigned secret   ": f"  password {LETTERS[:20]}",  # of a .netrc
    "netrc password": "machine api.wandb.ai login user password x",
    "Weights & Biases key": "wandb.login(key='" + "0123456789abcdef0123456789abcdef01234567" + "')",
    "registry login": '{"auths": {"ghcr.io": {"auth": "bWU6dHIwdWI0ZG9yJjN4"}}}',
    "Kaggle key": '{"username": "me", "key": "0123456789abcdef0123456789abcdef"}',
    "authorization header": "Authorization: Basic dXNlcjpwYXNzd29yZA==",
}


@pytest.mark.parametrize("kind", SECRETS)
def test_secrets_of_the_common_kinds_are_found_where_they_stand(kind: str) -> None:
    text = f"+import os\n-nothing here\n+{SECRETS[kind]}\n"
    assert (3, kind.strip()) in list(find_secrets(text.encode()))


@pytest.mark.parametrize(
    "text",
    [
        '"pad_token": "<|reserved_special_token_12|>", "tokens": {"train": 123456}',
        '"fingerprint": "' + "0123456789abcdef" * 4 + '", "git_sha": "' + "ab12" * 10 + '"',
        "See https://huggingface.co/owner/name:main and http://localhost:8080/a@b",
        "the password is never a secret; token: the unit of text; key = value",
        "transformers==5.6.0 scikit-learn==1.5 sk-learn-intro hf_hub hf_transfer",
        "wandb @ git+https://github.com/wandb/wandb@0123456789abcdef0123456789abcdef01234567",
        "the machine's password is asked for\npassword authentication",
        '"author": "me", "auth": true, "key": "train"',
        "password = getpass.getpass()\nself.token = token\ntoken=os.environ['HF_TOKEN']",
    ],
)
def test_what_is_no_secret_is_let_through(text: str) -> None:
    assert list(find_secrets(text.encode())) == []


def test_a_vocabulary_is_searched_for_known_shapes_alone() -> None:
    vocabulary = f'"password": "a1b2c3d4e5f6g7"\n"x": "hf_{LETTERS}"'.encode()
    assert list(find_secrets(vocabulary, assignments=False)) == [(2, "Hugging Face token")]


def test_the_public_record_holds_no_path_no_user_and_no_diff(tmp_path: Path) -> None:
    home = tmp_path / "home" / "somebody"
    (home / "models" / "base").mkdir(parents=True)
    config = tiny_config(
        home / "models" / "base",
        data={"train": str(home / "reviews.csv"), "test": str(home / "test.csv")},
        publish={"token_file": str(home / "token"), "repo_id": "me/stars"},
    )
    record = {
        "created": "2026-01-01T00:00:00Z",
        "config": {
            "file": str(home / "c.yaml"),
            "overrides": [f"publish.token_file={home}/token"],
            "given": config.model_dump(mode="json"),
            "resolved": config.model_dump(mode="json"),
        },
        "code": {"version": "0.1.0", "git_sha": "a" * 40, "dirty": True, "diff": "+secret\n"},
        "packages": {"torch": "2.13.0+cpu", "odd": f"file://{home}/wheel", f"{home}/x": "1"},
        "lock_sha256": {"cpu.lock": "b" * 64},
        "image": {"path": str(home / "a.sif"), "sha256": "c" * 64},
        "model": {"path": "x", "folder": str(home / "models" / "base"), "fingerprint": "d" * 64},
        "data": {"rows": {"train": 4, str(home): 5}, "fingerprint": "e" * 64, "note": str(home)},
        "snapshot": "code/abc",
        "reproduces": {"code": {"diff": "+secret\n"}},
        "user": "somebody",
    }
    public = public_record(record, config)
    text = json.dumps(public)
    assert "somebody" not in text and str(tmp_path) not in text and "secret" not in text
    assert public["image"] == {"sha256": "c" * 64}
    assert public["code"]["diff_sha256"] and public["code"]["dirty"]
    again = config_from_dict(public["config"]["resolved"])  # `reproduce` reads it
    assert again.data.train == "reviews.csv" and again.model.path == "base"
    assert again.train == config.train and again.publish.token_file is None


def test_links_count_as_what_they_lead_to(tmp_path: Path) -> None:
    run, secret = tmp_path / "run", tmp_path / "id_rsa"
    model = tmp_path / "hub" / "models--me--base" / "snapshots" / "abc"
    blobs = model.parents[1] / "blobs"
    for folder in (run, model, blobs):
        folder.mkdir(parents=True)
    secret.write_text("key")
    (blobs / "1").write_text("{}")
    (model / "good.json").symlink_to("../../blobs/1")
    (model / "bad.json").symlink_to(secret)
    (model / "loop").symlink_to("loop")
    (model / "plain.json").write_text("{}")
    (run / "up.json").symlink_to("../id_rsa")
    folders = allowed_folders(run, model)
    other = tmp_path / "plain" / "snapshots" / "abc"
    other.mkdir(parents=True)
    (tmp_path / "plain" / "blobs").symlink_to(tmp_path)  # no cache: it leads anywhere
    (other / "bad.json").symlink_to(secret)
    assert leads_outside(other / "bad.json", allowed_folders(run, other))
    inside = run / "folder"
    inside.symlink_to(tmp_path)  # a folder that is a link
    assert leads_outside(inside / "id_rsa", folders)
    os.mkfifo(run / "pipe")
    (run / "null").symlink_to("/dev/null")
    assert leads_outside(run / "pipe", folders) and leads_outside(run / "null", folders)
    good = [model / "good.json", model / "plain.json"]
    bad = [model / "bad.json", model / "loop", model / "absent", run / "up.json", run]
    assert [leads_outside(path, folders) for path in [*good, *bad]] == [False] * 2 + [True] * 5


def test_where_a_tokenizer_lay_is_dropped() -> None:
    values = {"name_or_path": "/home/me/base", "tokenizer_file": "~/t.json", "eos_token": "/s/"}
    assert without_local_keys(values) == {"eos_token": "/s/"}
    assert without_local_keys({"name_or_path": "owner/name"}) == {"name_or_path": "owner/name"}


@pytest.mark.parametrize("key", ["adapter", "from"])
def test_of_another_adapter_its_name_alone_is_public(key: str) -> None:
    for source, shown in (("/home/somebody/runs/first", "first"), ("owner/name", "owner/name")):
        config = tiny_config(Path("model"), train={key: source})
        assert public_config(config)["train"][key] == shown
