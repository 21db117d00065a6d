"""Files are whole or absent, on a disk that is really full too."""

from __future__ import annotations

import os
import subprocess
import threading
from pathlib import Path

import pytest

from yelp_hpc.errors import StageError
from yelp_hpc.rundir.files import (
    append_jsonl,
    damaged_files,
    is_complete,
    read_jsonl,
    write_bytes,
    write_json,
    write_marker,
)


def test_a_failed_write_keeps_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    write_json(path, {"old": 1})
    with pytest.raises(ValueError):
        write_json(path, float("nan"))
    assert path.read_text() == '{\n  "old": 1\n}\n'
    assert [p.name for p in tmp_path.iterdir()] == ["a.json"]


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting a small file system needs root")
def test_a_full_disk_is_named_and_nothing_overwritten(tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(disk)], check=True)
    try:
        write_bytes(disk / "file", b"old")
        with pytest.raises(StageError, match=r"No space left.*Nothing was overwritten"):
            write_bytes(disk / "file", bytes(200_000))
        assert (disk / "file").read_bytes() == b"old"
        assert [p.name for p in disk.iterdir()] == ["file"]
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def test_modes_respect_umask(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        write_bytes(tmp_path / "file", b"x")
    finally:
        os.umask(before)
    assert (tmp_path / "file").stat().st_mode & 0o777 == 0o640


def test_markers_find_missing_torn_and_altered_files(tmp_path: Path) -> None:
    for name in "abc":
        write_bytes(tmp_path / name, name.encode())
    assert damaged_files(tmp_path)  # no marker yet
    write_marker(tmp_path, ["a", "b", "c"])
    assert is_complete(tmp_path)
    (tmp_path / "a").unlink()
    (tmp_path / "b").write_bytes(b"B")
    problems = damaged_files(tmp_path)
    assert len(problems) == 2
    assert "a is missing" in problems[0]
    assert "SHA-256 differs" in problems[1]
    (tmp_path / "complete.json").write_text('{"files": {"a"')
    assert "missing or torn" in damaged_files(tmp_path)[0]


def test_concurrent_appends_do_not_mix_and_torn_lines_are_left_out(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"

    def write(writer: int) -> None:
        for i in range(50):
            append_jsonl(path, {"writer": writer, "i": i, "pad": "x" * 300})

    threads = [threading.Thread(target=write, args=(n,)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    with path.open("a") as file:
        file.write('{"torn": ')
    records = read_jsonl(path)
    assert len(records) == 200
    assert {(r["writer"], r["i"]) for r in records} == {(w, i) for w in range(4) for i in range(50)}
