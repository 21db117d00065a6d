"""Files are whole or absent, on a disk that is really full too."""

from __future__ import annotations

import errno
import os
import socket
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from yelp_hpc.errors import StageError
from yelp_hpc.rundir import locks
from yelp_hpc.rundir.files import (
    append_jsonl,
    atomic_folder,
    damaged_files,
    is_complete,
    parse_json,
    read_jsonl,
    sweep,
    sync_directory,
    temporary_name,
    write_bytes,
    write_json,
    write_marker,
)
from yelp_hpc.rundir.locks import locked
from yelp_hpc.rundir.modes import owner_name, unreachable


def test_a_failed_write_keeps_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    write_json(path, {"old": 1})
    with pytest.raises(ValueError):
        write_json(path, float("nan"))
    assert path.read_text() == '{\n  "old": 1\n}\n'
    assert [p.name for p in tmp_path.iterdir()] == ["a.json"]


def test_a_folder_is_replaced_whole_or_stays_as_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "a"
    with atomic_folder(folder) as new:
        write_json(new / "x.json", 1)
    with pytest.raises(ValueError), atomic_folder(folder) as new:
        (new / "y").write_text("half")
        raise ValueError
    with atomic_folder(folder, lambda made: (made / "x.json").is_file()) as new:
        (new / "z").write_text("as good as what is there")
    assert [path.name for path in folder.iterdir()] == ["x.json"]

    rename = Path.rename

    def refuse(self: Path, target: Path) -> Path:
        if target == folder and ".old" not in self.name:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", refuse)
    with pytest.raises(StageError, match="Nothing was overwritten"), atomic_folder(folder) as new:
        (new / "z").write_text("new")
    assert [path.name for path in folder.iterdir()] == ["x.json"]
    monkeypatch.undo()
    with atomic_folder(folder) as new:
        (new / "z").write_text("new")
    assert [path.name for path in tmp_path.rglob("*")] == ["a", "z"]


@pytest.mark.root
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


def test_a_torn_tail_is_healed_before_the_next_record(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    append_jsonl(path, {"n": 1})
    with path.open("a") as file:
        file.write('{"n": 2, "text": "half of')
    append_jsonl(path, {"n": 3})
    append_jsonl(path, {"n": 4})
    assert [record["n"] for record in read_jsonl(path)] == [1, 3, 4]


@pytest.mark.root
def test_a_record_that_a_full_disk_does_not_take_is_named_and_harms_no_other(
    tmp_path: Path,
) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(disk)], check=True)
    try:
        path = disk / "log.jsonl"
        append_jsonl(path, {"job": "1"})
        filler = disk / "filler"
        with pytest.raises(OSError), filler.open("wb", buffering=0) as file:
            while True:
                file.write(bytes(512))
        with pytest.raises(StageError, match=r"No space left.*not kept.*\"job\": \"2\""):
            append_jsonl(path, {"job": "2", "pad": "x" * 20_000})
        filler.unlink()
        append_jsonl(path, {"job": "3"})
        assert [record["job"] for record in read_jsonl(path)] == ["1", "3"]
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def test_only_the_temporaries_of_dead_writers_are_swept(tmp_path: Path) -> None:
    code = f"import sys; sys.path[:0] = {sys.path!r}\nfrom pathlib import Path\n"
    code += "from yelp_hpc.rundir.files import temporary_name\n"
    code += f"print(temporary_name(Path({str(tmp_path / 'a.json')!r})))"
    dead = Path(subprocess.check_output([sys.executable, "-c", code], text=True).strip())
    other = tmp_path / f".a.json.another-host.{os.getpid()}.tmp"
    kept = [temporary_name(tmp_path / "a.json"), other, tmp_path / ".tmp", tmp_path / "a.tmp"]
    old = [tmp_path / ".b.json.another-host.77.tmp", tmp_path / ".c.json.99999.tmp"]
    for path in [dead, *kept, *old]:
        path.write_text("x")
    for path in old:
        os.utime(path, (1.0, 1.0))
    folder = tmp_path / dead.name.replace("a.json", "step-1")
    (folder / "inner").mkdir(parents=True)
    sweep(tmp_path, tmp_path / "not there")
    assert sorted(tmp_path.iterdir()) == sorted(kept)
    assert socket.gethostname().partition(".")[0] in dead.name


def test_a_lock_is_held_by_one_writer_where_the_file_system_has_no_locks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import fcntl

    def refuse(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", refuse)
    count = tmp_path / "count"
    count.write_text("0")

    def add() -> None:
        for _ in range(20):
            with locked(tmp_path / "lock"):
                count.write_text(str(int(count.read_text()) + 1))

    threads = [threading.Thread(target=add) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert count.read_text() == "60"
    assert not (tmp_path / "lock.held").exists()


@pytest.mark.parametrize("away", [errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS])
def test_who_waits_for_long_is_told_for_whom(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], away: int
) -> None:
    """A writer of another login node died, on a file system without locks: nobody can tell."""
    import fcntl

    def refuse(*_: object) -> None:
        raise OSError(away, os.strerror(away))

    monkeypatch.setattr(fcntl, "flock", refuse)
    monkeypatch.setattr(locks, "SILENT", 0.0)
    held = tmp_path / "lock.held"
    held.write_text(".lock.login9.7.tmp")
    busy = pytest.raises(locks.Busy, match="process 7 on login9 is at it")
    with busy, locked(tmp_path / "lock", wait=0.4):
        pass
    (told,) = capsys.readouterr().err.splitlines()
    assert told == (
        f"waiting for process 7 on login9, which holds {held}; if that process is gone, remove "
        "the file"
    )
    os.utime(held, (1.0, 1.0))  # long ago
    with locked(tmp_path / "lock", wait=0):
        assert held.exists()
    assert not held.exists()


@pytest.mark.parametrize(
    ("number", "passes"), [(errno.EINVAL, True), (errno.ENOTSUP, True), (errno.EIO, False)]
)
def test_a_folder_that_cannot_be_flushed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, passes: bool
) -> None:
    real = os.fsync

    def fsync(descriptor: int) -> None:
        if Path(f"/proc/self/fd/{descriptor}").resolve() == tmp_path:
            raise OSError(number, os.strerror(number))
        real(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)
    if passes:
        sync_directory(tmp_path)
    else:
        with pytest.raises(StageError, match="holds its new content, but") as caught:
            write_bytes(tmp_path / "file", b"new")
        assert "Nothing was overwritten" not in str(caught.value)
        assert (tmp_path / "file").read_bytes() == b"new"


@pytest.mark.parametrize("name", ["/etc/passwd", "../secret", "a/../../secret", "", "a\nb"])
def test_a_marker_that_names_a_file_elsewhere_covers_nothing(tmp_path: Path, name: str) -> None:
    write_json(tmp_path / "complete.json", {"files": {name: "0" * 64}})
    assert len(damaged_files(tmp_path)) == 1 and not is_complete(tmp_path)


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("[" * 1_000_000, "nested too deeply"),
        ('{"a":' * 1_000_000, "nested too deeply"),
        ("1e309", "too large"),
        ("-1e999", "too large"),
        ("[NaN]", "NaN"),
        ("Infinity", "Infinity"),
        ("9" * 400, "too large"),
        ("", "Expecting value"),
        (b"\xff\xfe\x00", "codec"),
    ],
    ids=range(9),
)
def test_json_that_no_reader_should_meet_is_a_value_error(text: str | bytes, why: str) -> None:
    with pytest.raises(ValueError, match=why):
        parse_json(text)


@pytest.mark.parametrize(
    ("number", "remedy"),
    [
        (errno.EROFS, "read-only here: name a place"),
        (errno.EACCES, "name another"),
        (errno.ENOSPC, "free some space"),
        (errno.EDQUOT, "free some space"),
    ],
)
def test_a_refusal_says_what_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, remedy: str
) -> None:
    """Of a write through `atomic_path`, and of any other that ends a command."""

    def refuse(*_: object) -> None:
        raise OSError(number, os.strerror(number), str(tmp_path / "x"))

    monkeypatch.setattr(Path, "replace", refuse)
    with pytest.raises(StageError, match=f"Nothing was overwritten; .*{remedy}"):
        write_json(tmp_path / "x", {})
    with pytest.raises(OSError) as caught:
        refuse()
    assert remedy in unreachable(caught.value)
    tmp_path.chmod(0o1777)
    assert ("(sticky)" in unreachable(caught.value)) == (number == errno.EACCES)
    monkeypatch.setattr(os, "access", lambda path, _: path != tmp_path)
    if number == errno.EACCES:
        owner = owner_name(tmp_path.stat().st_uid)
        closed = f"{tmp_path} is {owner}'s, who can open it"
        assert f"{closed} (chmod g+rX)" in unreachable(caught.value)
        with pytest.raises(StageError, match=r"who can open it \(chmod g\+rwX\)"):
            write_json(tmp_path / "x", {})
        monkeypatch.setattr(os, "access", lambda path, how: path != tmp_path or not how & os.W_OK)
        assert f"{closed} (chmod g+w)" in unreachable(caught.value)
