"""The image on the host side: names, hashes and comparisons that need no Apptainer."""

from __future__ import annotations

import os
import struct
import subprocess
import sys
from pathlib import Path

import pytest

from tests.tiny import SIF
from yelp_hpc.errors import RequestError, StageError
from yelp_hpc.image.build import build, build_argv
from yelp_hpc.image.check import driver_problems, version_problems
from yelp_hpc.image.file import image_sha256, normalise
from yelp_hpc.image.steps import call
from yelp_hpc.own_files import SHARE
from yelp_hpc.rundir.files import sha256_file


def sif(path: Path, uuid: bytes, time: int) -> Path:
    """A SIF of one descriptor (offsets of sylabs/sif) and eight bytes of data."""
    header = bytearray(128)
    header[32:42] = b"SIF_MAGIC\0"
    header[48:64] = uuid
    struct.pack_into("<qq", header, 64, time, time)
    struct.pack_into("<qq", header, 88, 1, 128)
    descriptor = bytearray(585)
    descriptor[4] = 1
    struct.pack_into("<qq", descriptor, 41, time, time)
    path.write_bytes(bytes(header + descriptor) + b"contents")
    return path


def test_equal_contents_are_equal_files(tmp_path: Path) -> None:
    first = sif(tmp_path / "a.sif", b"a" * 16, 1_700_000_000)
    second = sif(tmp_path / "b.sif", b"b" * 16, 1_800_000_000)
    assert sha256_file(first) != sha256_file(second)
    normalise(first)
    normalise(second)
    assert first.read_bytes() == second.read_bytes()
    assert first.read_bytes().endswith(b"contents")


def test_what_is_no_sif_is_refused(tmp_path: Path) -> None:
    (tmp_path / "x.sif").write_bytes(b"short")
    with pytest.raises(StageError, match="no SIF"):
        normalise(tmp_path / "x.sif")


def test_a_changed_image_is_hashed_again(tmp_path: Path) -> None:
    image = tmp_path / "i.sif"
    image.write_bytes(b"one")
    assert image_sha256(image) == image_sha256(image) == sha256_file(image)
    image.write_bytes(b"two!")
    assert image_sha256(image) == sha256_file(image)
    image.with_name(".i.sif.sha256.json").write_text("[torn")
    assert image_sha256(image) == sha256_file(image)
    with pytest.raises(StageError, match="cannot read"):
        image_sha256(tmp_path / "none.sif")


def test_an_unchanged_image_is_not_read_again(tmp_path: Path) -> None:
    image = tmp_path / "i.sif"
    image.write_bytes(b"one")
    before = image_sha256(image)
    stat = image.stat()
    image.write_bytes(b"two")
    os.utime(image, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert image_sha256(image) == before


def test_versions_that_differ_from_the_lock_are_named() -> None:
    lock = (
        "torch==2.13.0 \\\n    --hash=sha256:0\nPyYAML==6.0.3 \\\n    --hash=sha256:1\nruff==1.0\n"
    )
    assert version_problems(lock, {"torch": "2.13.0+cpu", "pyyaml": "6.0.3"}) == []
    (problem,) = version_problems(lock, {"torch": "2.12.0", "pyyaml": "6.0.3"})
    assert "torch is 2.12.0 in the image, the lock says 2.13.0" in problem
    assert version_problems(lock, {"other": "1"})
    assert version_problems("", {"torch": "2.13.0"})


@pytest.mark.parametrize(
    ("image", "driver", "sound"),
    [
        ("13.0", "12.8", False),
        ("12.8", "12.4", True),
        ("12.8", "13.0", True),
        ("13.0", None, True),
        (None, "13.0", False),
        (None, None, True),
    ],
)
def test_a_driver_must_be_of_the_images_major_version(
    image: str | None, driver: str | None, sound: bool
) -> None:
    assert (driver_problems(image, driver) == []) is sound


def test_flags_of_a_build_stand_before_its_files() -> None:
    binds = [(Path("/s"), "/mnt")]
    argv = build_argv(Path("/i.sif"), Path("/a.def"), ["--build-arg", "A=1"], binds)
    assert argv[-2:] == ["/i.sif", "/a.def"]
    assert argv[argv.index("--bind") + 1] == "/s:/mnt"
    assert "--fakeroot" in argv


def test_all_that_a_build_lacks_is_said_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(RequestError) as error:
        build(tmp_path / "no" / "image", tmp_path / "no.lock", base="nothing")
    (tmp_path / "notes.sif").write_text("notes\n" * 50)
    with pytest.raises(RequestError, match=r"notes\.sif is there already; name another"):
        build(tmp_path / "notes.sif", tmp_path / "no.lock")
    (tmp_path / "notes.sif").unlink()
    said = str(error.value)
    parts = ["apptainer is not on PATH", "no.lock does not exist", "ends in .sif"]
    for part in [*parts, "no does not exist", "'nothing' is neither"]:
        assert part in said
    assert list(tmp_path.iterdir()) == []


def test_a_container_program_of_another_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    labels = '{"data": {"attributes": {"labels": {"yelp-hpc.version": "1"}}}}'
    (tmp_path / "singularity").write_text(f"#!/bin/sh\necho '{labels}'\n")
    (tmp_path / "singularity").chmod(0o755)
    image, cluster = tmp_path / "a.sif", tmp_path / "c.yaml"
    image.write_bytes(SIF)
    cluster.write_text("programs: {apptainer: singularity}\n")
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")

    def look(*more: str) -> subprocess.CompletedProcess[str]:
        argv = [sys.executable, "-m", "yelp_hpc", "image", "info", str(image), *more]
        return subprocess.run(argv, capture_output=True, text=True, check=False)

    assert "version      1" in look("--cluster", str(cluster)).stdout
    cluster.write_text("programs: {apptainer: no-such-program}\n")
    refused = look("--cluster", str(cluster))
    assert refused.returncode == 2 and "no-such-program is not on PATH" in refused.stderr


def test_every_module_is_compiled_and_only_a_foreign_newer_syntax_may_stay(tmp_path: Path) -> None:
    (tmp_path / "package").mkdir()
    (tmp_path / "yelp_hpc").mkdir()
    for number in range(5):
        (tmp_path / "package" / f"m{number}.py").write_text(f"x = {number}\n")
    (tmp_path / "package" / "newer.py").write_text("def f[T](a: ) -> !\n")

    def compile_all() -> list[int]:
        script = str(SHARE / "containers" / "compile.py")
        parts = [[sys.executable, script, str(tmp_path), str(part), "2"] for part in range(2)]
        return [subprocess.run(argv, capture_output=True, check=False).returncode for argv in parts]

    assert compile_all() == [0, 0]
    made = sorted((tmp_path / "package" / "__pycache__").iterdir())
    assert [path.name.partition(".")[0] for path in made] == [f"m{n}" for n in range(5)]
    # PEP 552: by hash, and the hash is not checked
    assert {path.read_bytes()[4:8] for path in made} == {b"\x01\0\0\0"}
    (tmp_path / "yelp_hpc" / "broken.py").write_text("def f(:\n")
    assert sorted(compile_all()) == [0, 1]


def test_a_failed_step_shows_why_and_no_progress_bar(tmp_path: Path) -> None:
    said = "[=====/ ] 10 of 20\\nFATAL: no base\\n" + "\\n".join(f"more {n}" for n in range(20))
    with pytest.raises(StageError) as error:
        call(["sh", "-c", f"printf '{said}'; exit 3"], "the step")
    lines = str(error.value).splitlines()
    assert lines[0] == "the step: sh ended with 3:"
    assert lines[1] == "  FATAL: no base"
    assert len(lines) == 13


def test_no_step_is_handed_the_hubs_token(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_of_the_user")
    call([sys.executable, "-c", "import os, sys; sys.exit('HF_TOKEN' in os.environ)"], "a step")
