"""What the local Hub holds, on disk, and the faults that are in force.

A JSON file a repository with its commits and refs, blobs by their git id, LFS objects by SHA-256.
"""

from __future__ import annotations

import hashlib
import json
import re
import threading
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


@dataclass
class Fault:
    """What goes wrong with the next `times` requests whose `METHOD /path` matches."""

    match: str
    status: int = 0
    times: int = 1
    headers: dict[str, str] = field(default_factory=dict)
    message: str = "injected"
    cut: int | None = None
    """Read so many bytes of the request's body, then reset the connection."""
    after: bool = False
    """Do the work first, then lose the answer (reset the connection)."""
    stall: float = 0.0
    """Seconds to stand still after reading `cut` bytes."""


class Hub:
    """The state on disk and the rules in force."""

    def __init__(self, root: Path, chunk: int = 64_000) -> None:
        self.root, self.chunk = root, chunk
        self.lock = threading.RLock()
        self.faults: list[Fault] = []
        self.requests: list[str] = []
        self.tokens: dict[str, dict[str, Any]] = {"good-token": {"user": "me", "write": True}}
        self.url = ""
        (root / "lfs").mkdir(parents=True, exist_ok=True)
        (root / "blobs").mkdir(exist_ok=True)
        (root / "repos").mkdir(exist_ok=True)

    def fault(self, request: str) -> Fault | None:
        with self.lock:
            for fault in self.faults:
                if fault.times > 0 and re.search(fault.match, request):
                    fault.times -= 1
                    return fault
        return None

    def count(self, pattern: str) -> int:
        return sum(bool(re.search(pattern, r)) for r in self.requests)

    # Repositories

    def path(self, repo: str) -> Path:
        return self.root / "repos" / (repo.replace("/", "--") + ".json")

    def load(self, repo: str) -> dict[str, Any] | None:
        path = self.path(repo)
        return json.loads(path.read_text()) if path.exists() else None

    def save(self, repo: str, state: dict[str, Any]) -> None:
        self.path(repo).write_text(json.dumps(state))

    def create(self, repo: str, private: bool) -> dict[str, Any]:
        state: dict[str, Any] = {"private": private, "refs": {}, "commits": {}, "pulls": []}
        blob = self.put_blob(b"*.safetensors filter=lfs diff=lfs merge=lfs -text\n")
        self.commit(state, "refs/heads/main", {".gitattributes": blob}, "initial commit", None)
        self.save(repo, state)
        return state

    def commit(
        self, state: dict[str, Any], ref: str, files: dict[str, Any], title: str, parent: str | None
    ) -> str:
        number = len(state["commits"])
        oid = hashlib.sha1(json.dumps([files, title, parent, number]).encode()).hexdigest()
        state["commits"][oid] = {"files": files, "title": title, "parent": parent}
        state["refs"][ref] = oid
        return oid

    def resolve(self, state: dict[str, Any], revision: str) -> str | None:
        if revision in state["commits"]:
            return revision
        found: str | None = state["refs"].get(revision) or state["refs"].get(
            f"refs/heads/{revision}"
        )
        return found

    def put_blob(self, content: bytes) -> dict[str, Any]:
        oid = hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
        (self.root / "blobs" / oid).write_bytes(content)
        return {"oid": oid, "size": len(content)}

    def lfs_entry(self, sha: str) -> dict[str, Any]:
        size = (self.root / "lfs" / sha).stat().st_size
        pointer = (
            f"version https://git-lfs.github.com/spec/v1\noid sha256:{sha}\nsize {size}\n".encode()
        )
        oid = hashlib.sha1(b"blob %d\0" % len(pointer) + pointer).hexdigest()
        return {
            "oid": oid,
            "size": size,
            "lfs": {"oid": sha, "size": size, "pointerSize": len(pointer)},
        }

    def content(self, entry: dict[str, Any]) -> bytes:
        lfs = entry.get("lfs")
        path: Path = self.root / ("lfs/" + lfs["oid"] if lfs else "blobs/" + entry["oid"])
        return path.read_bytes()

    def files(self, repo: str, revision: str = "main") -> dict[str, bytes]:
        """Every file of a revision, for assertions."""
        state = self.load(repo)
        assert state is not None
        oid = self.resolve(state, revision)
        assert oid is not None
        return {n: self.content(e) for n, e in state["commits"][oid]["files"].items()}

    def history(self, repo: str, revision: str = "main") -> list[str]:
        """Titles of the commits of a revision, oldest first."""
        state = self.load(repo)
        assert state is not None
        titles, oid = [], self.resolve(state, revision)
        while oid:
            titles.append(state["commits"][oid]["title"])
            oid = state["commits"][oid]["parent"]
        return titles[::-1]
