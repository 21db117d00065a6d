"""A local server that speaks the Hub's HTTP protocol, as far as huggingface_hub's client needs it.

For tests only. The state lies on disk (`state.py`), so a new server on the same folder goes on
where the old one stopped; its rules say which requests go wrong, and how.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import socket
import struct
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

import yaml

from tests.hub.state import Hub

LFS_FROM = 2048  # bytes; larger files and weights go to LFS
WEIGHTS = (".safetensors", ".bin", ".png")


class Refuse(Exception):
    def __init__(self, status: int, message: str, code: str | None = None) -> None:
        self.status, self.message, self.code = status, message, code


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: Hub

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def reset(self) -> None:
        linger = struct.pack("ii", 1, 0)
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
        self.connection.close()
        self.close_connection = True

    def handle_one_request(self) -> None:
        try:
            super().handle_one_request()
        except (ConnectionError, ValueError, OSError):
            self.close_connection = True

    def answer(self, value: Any, status: int = 200, headers: dict[str, str] | None = None) -> None:
        if getattr(self, "lose_answer", False):
            self.reset()
            return
        body = value if isinstance(value, bytes) else json.dumps(value).encode()
        self.send_response(status)
        for name, text in (headers or {}).items():
            self.send_header(name, text)
        if "Content-Length" not in (headers or {}):
            self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def serve(self) -> None:
        self.lose_answer = False
        split = urlsplit(self.path)
        self.query = parse_qs(split.query)
        request = f"{self.command} {split.path}"
        self.hub.requests.append(request)
        length = int(self.headers.get("Content-Length") or 0)
        fault = self.hub.fault(request)
        if fault and fault.cut is not None:
            self.rfile.read(min(fault.cut, length))
            time.sleep(fault.stall)
            self.reset()
            return
        self.body = self.read_body(length)
        if fault and fault.after:
            self.lose_answer = True
        elif fault:
            headers = {"X-Error-Message": fault.message, **fault.headers}
            self.answer({"error": fault.message}, fault.status, headers)
            return
        try:
            with self.hub.lock:
                self.route(self.command, unquote(split.path), split.path)
        except Refuse as refusal:
            headers = {"X-Error-Message": refusal.message}
            if refusal.code:
                headers["X-Error-Code"] = refusal.code
            self.answer({"error": refusal.message}, refusal.status, headers)

    do_GET = do_POST = do_PUT = do_HEAD = serve

    def read_body(self, length: int) -> bytes:
        if self.headers.get("Transfer-Encoding", "").lower() != "chunked":
            return self.rfile.read(length)
        body = b""
        while size := int(self.rfile.readline().strip() or b"0", 16):
            body += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return body

    # Who asks

    def who(self) -> dict[str, Any] | None:
        value = self.headers.get("Authorization", "")
        if not value:
            return None
        found = self.hub.tokens.get(value.removeprefix("Bearer "))
        if found is None:
            raise Refuse(401, "Invalid credentials in Authorization header")
        return found

    def repo(self, name: str, write: bool = False) -> dict[str, Any]:
        who = self.who()
        state = self.hub.load(name)
        if state is None or (state["private"] and who is None):
            raise Refuse(404 if who else 401, "Repository not found", "RepoNotFound")
        if write:
            self.may_write(name)
        return state

    def may_write(self, name: str) -> None:
        who = self.who()
        if who is None:
            raise Refuse(401, "Invalid username or password.")
        if not who["write"] or name.split("/")[0] != who["user"]:
            raise Refuse(403, "You don't have the rights to write to this namespace")

    def revision(self, state: dict[str, Any], revision: str) -> str:
        oid = self.hub.resolve(state, revision)
        if oid is None:
            raise Refuse(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return oid

    # What is asked

    def route(self, method: str, path: str, raw: str) -> None:
        hub = self.hub
        if path == "/api/whoami-v2":
            who = self.who()
            if who is None:
                raise Refuse(401, "Invalid username or password.")
            return self.answer({"name": who["user"], "type": "user", "orgs": []})
        if path == "/api/validate-yaml":
            return self.validate_yaml()
        if path == "/api/repos/create":
            return self.create_repo()
        if match := re.fullmatch(r"/_store/([0-9a-f]{64})(?:/(\d+))?", path):
            return self.store(match[1], match[2])
        if match := re.fullmatch(r"/_complete/([0-9a-f]{64})", path):
            return self.complete(match[1])
        if match := re.fullmatch(r"/([^/]+/[^/]+)\.git/info/lfs/objects/batch", path):
            return self.lfs_batch(match[1])
        if path.endswith("/info/lfs/verify"):
            wanted = json.loads(self.body)["oid"]
            if not (hub.root / "lfs" / wanted).exists():
                raise Refuse(404, "no such object")
            return self.answer({})
        if match := re.fullmatch(r"/api/models/([^/]+/[^/]+)/(\w[\w-]*)(?:/(.+))?", raw):
            return self.api(match[1], match[2], unquote(match[3] or ""), match[3] or "")
        if match := re.fullmatch(r"/api/models/([^/]+/[^/]+)", path):
            return self.info(match[1], "main")
        if match := re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", raw):
            return self.download(match[1], unquote(match[2]), unquote(match[3]))
        raise Refuse(404, f"unknown address {path}")

    def validate_yaml(self) -> None:
        """The real service checks more; here only that the head is YAML."""
        content = json.loads(self.body)["content"]
        try:
            head = yaml.safe_load(content.split("---")[1])
            errors = [] if isinstance(head, dict) else [{"message": "not a mapping"}]
        except (yaml.YAMLError, IndexError) as error:
            errors = [{"message": str(error)}]
        self.answer({"errors": errors, "warnings": []}, 400 if errors else 200)

    def create_repo(self) -> None:
        wanted = json.loads(self.body)
        who = self.who()
        if who is None:
            raise Refuse(401, "Invalid username or password.")
        name = f"{wanted.get('organization') or who['user']}/{wanted['name']}"
        self.may_write(name)
        url = f"{self.hub.url}/{name}"
        if self.hub.load(name) is not None:
            return self.answer({"error": "You already created this model repo", "url": url}, 409)
        self.hub.create(name, wanted.get("visibility") == "private" or bool(wanted.get("private")))
        self.answer({"url": url, "name": name})

    def info(self, repo: str, revision: str) -> None:
        state = self.repo(repo)
        oid = self.revision(state, revision)
        files = state["commits"][oid]["files"]
        self.answer(
            {
                "_id": "1",
                "id": repo,
                "modelId": repo,
                "sha": oid,
                "private": state["private"],
                "tags": [],
                "siblings": [{"rfilename": name} for name in sorted(files)],
            }
        )

    def api(self, repo: str, what: str, rest: str, raw: str) -> None:
        hub = self.hub
        if what == "revision":
            return self.info(repo, rest)
        if what == "refs":
            state = self.repo(repo)
            refs = [
                {"name": r.removeprefix("refs/heads/"), "ref": r, "targetCommit": oid}
                for r, oid in state["refs"].items()
            ]
            heads = [r for r in refs if r["ref"].startswith("refs/heads/")]
            pulls = [r for r in refs if r["ref"].startswith("refs/pr/")]
            return self.answer(
                {"branches": heads, "converts": [], "tags": [], "pullRequests": pulls}
            )
        if what == "branch":
            state = self.repo(repo, write=True)
            if f"refs/heads/{rest}" in state["refs"]:
                raise Refuse(409, "Reference already exists")
            start = json.loads(self.body or b"{}").get("startingPoint", "main")
            state["refs"][f"refs/heads/{rest}"] = self.revision(state, start)
            hub.save(repo, state)
            return self.answer({})
        if what == "tree":
            quoted, _, folder = raw.partition("/")
            return self.tree(repo, unquote(quoted), unquote(folder))
        if what == "preupload":
            self.preupload(repo, rest)
        elif what == "commit":
            self.make_commit(repo, rest)
        elif what == "discussions":
            self.discussions(repo)
        else:
            raise Refuse(404, f"unknown address {what}")

    def tree(self, repo: str, revision: str, folder: str) -> None:
        state = self.repo(repo)
        files = state["commits"][self.revision(state, revision)]["files"]
        inside = {n: e for n, e in files.items() if not folder or n.startswith(folder + "/")}
        if folder and not inside:
            raise Refuse(404, f"{folder} does not exist on {revision}", "EntryNotFound")
        self.answer([{"type": "file", "path": n, **e} for n, e in sorted(inside.items())])

    def discussions(self, repo: str) -> None:
        state = self.repo(repo)
        first = self.query.get("p", ["0"]) == ["0"]
        pulls = [
            {
                "num": pull["num"],
                "title": pull["title"],
                "author": {"name": "me"},
                "createdAt": "2024-01-01T00:00:00.000Z",
                "status": pull["status"],
                "repo": {"name": repo, "type": "model"},
                "isPullRequest": True,
            }
            for pull in state["pulls"]
            if first and pull["status"] == "open"
        ]
        self.answer({"discussions": pulls, "count": len(pulls), "start": 0})

    def preupload(self, repo: str, revision: str) -> None:
        state = self.repo(repo, write="create_pr" not in self.query)
        files = state["commits"][self.revision(state, revision)]["files"]
        answers = []
        for asked in json.loads(self.body)["files"]:
            large = asked["size"] > LFS_FROM or asked["path"].endswith(WEIGHTS)
            entry = files.get(asked["path"])
            known = None if entry is None else entry.get("lfs", entry)["oid"]
            answers.append(
                {
                    "path": asked["path"],
                    "uploadMode": "lfs" if large else "regular",
                    "shouldIgnore": False,
                    "oid": known,
                }
            )
        self.answer({"files": answers, "commitOid": self.revision(state, revision)})

    def lfs_batch(self, repo: str) -> None:
        self.repo(repo)
        hub, objects = self.hub, []
        for wanted in json.loads(self.body)["objects"]:
            sha, size = wanted["oid"], wanted["size"]
            if (hub.root / "lfs" / sha).exists():
                objects.append(wanted)
                continue
            upload: dict[str, Any] = {"href": f"{hub.url}/_store/{sha}?X-Amz-Signature=secret"}
            if size > hub.chunk:
                parts = -(-size // hub.chunk)
                header = {"chunk_size": str(hub.chunk)}
                for part in range(1, parts + 1):
                    header[str(part)] = f"{hub.url}/_store/{sha}/{part}?X-Amz-Signature=secret"
                upload = {"href": f"{hub.url}/_complete/{sha}", "header": header}
            verify = {"href": f"{hub.url}/{repo}.git/info/lfs/verify", "header": {}}
            objects.append({**wanted, "actions": {"upload": upload, "verify": verify}})
        self.answer({"transfer": "basic", "objects": objects})

    def store(self, sha: str, part: str | None) -> None:
        folder = self.hub.root / "lfs"
        if part is None:
            if hashlib.sha256(self.body).hexdigest() != sha:
                raise Refuse(400, "the content's hash is another")
            (folder / sha).write_bytes(self.body)
        else:
            (folder / f"{sha}.{int(part):05d}").write_bytes(self.body)
        self.answer({}, headers={"ETag": f'"{hashlib.md5(self.body).hexdigest()}"'})

    def complete(self, sha: str) -> None:
        folder = self.hub.root / "lfs"
        wanted = json.loads(self.body)["parts"]
        parts = [folder / f"{sha}.{part['partNumber']:05d}" for part in wanted]
        content = b"".join(part.read_bytes() for part in parts)
        if hashlib.sha256(content).hexdigest() != sha:
            raise Refuse(400, "the content's hash is another")
        (folder / sha).write_bytes(content)
        for part in parts:
            part.unlink()
        self.answer({})

    def make_commit(self, repo: str, revision: str) -> None:
        hub, pull = self.hub, "create_pr" in self.query
        state = self.repo(repo, write=not pull)
        parent = self.revision(state, revision)
        files = dict(state["commits"][parent]["files"])
        title = ""
        for line in self.body.splitlines():
            item = json.loads(line)
            key, value = item["key"], item["value"]
            if key == "header":
                title = value["summary"]
                if value.get("parentCommit", parent) != parent and not pull:
                    raise Refuse(412, "A commit has happened since. Please refresh and try again.")
            elif key == "file":
                files[value["path"]] = hub.put_blob(base64.b64decode(value["content"]))
            elif key == "lfsFile":
                if not (hub.root / "lfs" / value["oid"]).exists():
                    raise Refuse(400, f"LFS object {value['oid']} was never uploaded")
                files[value["path"]] = hub.lfs_entry(value["oid"])
            elif key == "deletedFile" and files.pop(value["path"], None) is None:
                raise Refuse(404, "A file with this name doesn't exist", "EntryNotFound")
        ref, url = f"refs/heads/{revision}", None
        if pull:
            number = len(state["pulls"]) + 1
            ref, url = f"refs/pr/{number}", f"{hub.url}/{repo}/discussions/{number}"
            state["pulls"].append({"num": number, "title": title, "status": "open"})
        oid = hub.commit(state, ref, files, title, parent)
        hub.save(repo, state)
        answer = {"commitUrl": f"{hub.url}/{repo}/commit/{oid}", "commitOid": oid}
        self.answer({**answer, "pullRequestUrl": url} if pull else answer)

    def download(self, repo: str, revision: str, name: str) -> None:
        state = self.repo(repo)
        oid = self.revision(state, revision)
        entry = state["commits"][oid]["files"].get(name)
        if entry is None:
            raise Refuse(404, f"{name} does not exist on {revision}", "EntryNotFound")
        content = self.hub.content(entry)
        etag = entry.get("lfs", entry)["oid"]
        headers = {"X-Repo-Commit": oid, "ETag": f'"{etag}"', "Content-Length": str(len(content))}
        if entry.get("lfs"):
            headers |= {"X-Linked-Etag": f'"{etag}"', "X-Linked-Size": str(len(content))}
        status, start = 200, re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))
        if start:
            status, content = 206, content[int(start[1]) :]
            headers["Content-Length"] = str(len(content))
        self.answer(content, status, headers)


@contextmanager
def serving(hub: Hub) -> Iterator[Hub]:
    """Serve `hub` on a free port of 127.0.0.1."""
    handler = type("HubHandler", (Handler,), {"hub": hub})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.daemon_threads = True
    hub.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
