"""The Hub, as far as publishing needs it: what is there, one commit, retries, one clear message.

Talks to `HF_ENDPOINT` (the public Hub by default) through huggingface_hub. Files that the Hub
has already are neither sent nor committed again, so a repeated call finishes what was begun.
"""

from __future__ import annotations

import hashlib
import os
import re
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, get_session
from huggingface_hub.errors import (
    HfHubHTTPError,
    HFValidationError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
)
from huggingface_hub.utils import logging
from huggingface_hub.utils.tqdm import disable_progress_bars

from yelp_hpc.data.hub import shell_problem
from yelp_hpc.errors import RequestError, StageError
from yelp_hpc.progress import say
from yelp_hpc.publishing.token import Token, redact
from yelp_hpc.rundir.files import sha256_file

Result = TypeVar("Result")

RETRIED = {408, 409, 412, 425, 429, 500, 502, 503, 504}
"""409 and 412: somebody else committed meanwhile; what is there is then compared again."""
LONGEST_WAIT = 300.0
TIMEOUT = 120.0
"""Seconds without a byte after which a request is given up; the client itself waits for ever."""


@dataclass(frozen=True)
class Backoff:
    """How often and how long a failed call is tried again (seconds, doubling)."""

    attempts: int = 6
    first: float = 1.0
    most: float = 60.0


@dataclass(frozen=True)
class HubFile:
    """A file to publish: its name on the Hub and its content, on disk or in memory."""

    name: str
    content: Path | bytes
    size: int
    sha256: str

    @classmethod
    def of(cls, name: str, content: Path | bytes) -> HubFile:
        """`content` is a file to read, or the bytes themselves."""
        if isinstance(content, bytes):
            return cls(name, content, len(content), hashlib.sha256(content).hexdigest())
        return cls(name, content, content.stat().st_size, sha256_file(content))

    def git_sha1(self) -> str:
        """The git blob id, by which the Hub knows a file that is not in LFS."""
        digest = hashlib.sha1(f"blob {self.size}\0".encode(), usedforsecurity=False)
        if isinstance(self.content, bytes):
            digest.update(self.content)
        else:
            with self.content.open("rb") as file:
                while block := file.read(1 << 20):
                    digest.update(block)
        return digest.hexdigest()


@dataclass(frozen=True)
class Target:
    """Where the files go."""

    repo_id: str
    private: bool
    branch: str | None = None
    pull_request: bool = False


@dataclass(frozen=True)
class Published:
    """Where the files are."""

    commit: str
    url: str
    pull_request: str | None
    committed: bool
    """False: all was there already."""


class WaitTooLong(Exception):
    """The server asks for a longer pause than a job should sleep through."""


def publish_files(
    files: Sequence[HubFile],
    target: Target,
    token: Token,
    message: str,
    *,
    obsolete: Sequence[str] = (),
    backoff: Backoff | None = None,
) -> Published:
    """Bring the repository to hold exactly these contents, in one commit or none.

    Args:
        obsolete: names that an earlier publication put there and that are deleted now.

    Raises:
        RequestError: token, name, branch or visibility is refused.
        StageError: the Hub cannot be reached or keeps failing; run again to finish.
    """
    disable_progress_bars()
    # The client's own warnings of a retry quote the URLs of uploads, which are signed.
    logging.set_verbosity_error()
    hub = _Hub(target, token, backoff or Backoff())
    hub.call("look at the repository", hub.ensure_repo)
    if target.branch and not target.pull_request:
        hub.call("make the branch", hub.ensure_branch)
    return hub.call("upload", lambda: hub.bring_up_to_date(files, message, obsolete))


class _Hub:
    def __init__(self, target: Target, token: Token, backoff: Backoff) -> None:
        # The variable, not the constant: huggingface_hub reads it at import only.
        self.api = HfApi(endpoint=os.environ.get("HF_ENDPOINT") or None, token=token.secret)
        self.target, self.token, self.backoff = target, token, backoff

    def call(self, what: str, action: Callable[[], Result]) -> Result:
        """Run `action`, again after faults that pass; turn the last fault into one message."""
        for attempt in range(self.backoff.attempts):
            try:
                session = get_session()
                session.timeout = TIMEOUT
                hooks = session.event_hooks
                if _refuse_long_waits not in hooks["response"]:
                    session.event_hooks = {
                        **hooks,
                        "response": [*hooks["response"], _refuse_long_waits],
                    }
                return action()
            except (RequestError, StageError):
                raise
            except Exception as error:
                if problem := shell_problem(error):
                    raise RequestError(problem) from None
                cause = _root(error)
                if not _passes(cause) or attempt + 1 == self.backoff.attempts:
                    raise self.explain(what, cause, attempt + 1) from None
                wait = min(self.backoff.first * 2**attempt, self.backoff.most)
                wait = max(wait, _asked_wait(cause) or 0.0)
                say(f"publish: {self.describe(cause)}; trying again in {wait:.0f} s")
                time.sleep(wait)
        raise AssertionError("at least one attempt")

    def ensure_repo(self) -> None:
        target = self.target
        try:
            info = self.api.repo_info(target.repo_id)
        except RepositoryNotFoundError as error:
            if error.response.status_code == 401:
                raise
            self.api.create_repo(target.repo_id, private=target.private, exist_ok=True)
            say(f"publish: created {target.repo_id}")
            info = self.api.repo_info(target.repo_id)
        if target.private and not info.private:
            raise RequestError(
                f"{target.repo_id} exists and is public, but publish.private is true: nothing was "
                "uploaded. Make the repository private, name another, or set publish.private=false"
            )
        if info.private and not target.private:
            say(f"publish: {target.repo_id} exists and is private; it stays private")

    def ensure_branch(self) -> None:
        assert self.target.branch
        self.api.create_branch(self.target.repo_id, branch=self.target.branch, exist_ok=True)

    def bring_up_to_date(
        self, files: Sequence[HubFile], message: str, obsolete: Sequence[str]
    ) -> Published:
        target = self.target
        revision = target.branch or "main"
        head = str(self.api.repo_info(target.repo_id, revision=revision).sha)
        changed, gone = self.changes(head, files, obsolete)
        if not changed and not gone:
            return self.published(head, None, committed=False)
        if target.pull_request and (found := self.same_pull_request(files)):
            return found
        operations: list[Any] = [
            CommitOperationAdd(
                path_in_repo=file.name,
                path_or_fileobj=file.content
                if isinstance(file.content, bytes)
                else str(file.content),
            )
            for file in changed
        ]
        operations += [CommitOperationDelete(path_in_repo=name) for name in gone]
        say(f"publish: uploading {len(changed)} files, {sum(f.size for f in changed) / 1e6:.1f} MB")
        info = self.api.create_commit(
            target.repo_id,
            operations,
            commit_message=message,
            revision=target.branch,
            create_pr=target.pull_request,
            parent_commit=head,
        )
        return self.published(str(info.oid), info.pr_url, committed=True)

    def changes(
        self, revision: str, files: Sequence[HubFile], obsolete: Sequence[str] = ()
    ) -> tuple[list[HubFile], list[str]]:
        """The files whose content the Hub does not have yet, and the obsolete ones that it has."""
        there = {
            entry.path: entry
            for entry in self.api.list_repo_tree(
                self.target.repo_id, recursive=True, revision=revision
            )
            if hasattr(entry, "blob_id")
        }

        def is_there(file: HubFile) -> bool:
            entry: Any = there.get(file.name)
            if entry is None:
                return False
            if entry.lfs:
                return bool(entry.lfs.sha256 == file.sha256)
            return bool(entry.blob_id == file.git_sha1())

        return [f for f in files if not is_there(f)], [n for n in obsolete if n in there]

    def same_pull_request(self, files: Sequence[HubFile]) -> Published | None:
        """An open pull request that offers these contents: a lost answer makes no second one."""
        open_ones = self.api.get_repo_discussions(
            self.target.repo_id, discussion_type="pull_request", discussion_status="open"
        )
        numbers = sorted((d.num for d in open_ones), reverse=True)[:20]
        for number in numbers:
            reference = f"refs/pr/{number}"
            if not self.changes(reference, files)[0]:
                head = str(self.api.repo_info(self.target.repo_id, revision=reference).sha)
                url = f"{self.api.endpoint}/{self.target.repo_id}/discussions/{number}"
                return self.published(head, url, committed=False)
        return None

    def published(self, commit: str, pull_request: str | None, committed: bool) -> Published:
        url = f"{self.api.endpoint}/{self.target.repo_id}"
        return Published(commit, url, pull_request, committed)

    # Faults

    def describe(self, error: BaseException) -> str:
        """A fault in one line, without the token and without signed addresses."""
        if isinstance(error, HfHubHTTPError):
            said = " ".join((error.server_message or "").split())[:200]
            text = f"the Hub answered {error.response.status_code}" + (f" ({said})" if said else "")
        else:
            text = " ".join(str(error).split())[:300] or type(error).__name__
        text = re.sub(r"(https?://[^\s?'\"]+)\?[^\s'\"]*", r"\1", text)
        return redact(text, self.token.secret)

    def explain(self, what: str, error: BaseException, attempts: int) -> Exception:
        """The one message for a fault that did not pass."""
        repo, told = self.target.repo_id, self.describe(error)
        if isinstance(error, OfflineModeIsEnabled):
            return RequestError(
                "HF_HUB_OFFLINE is set, so the Hub is not asked; unset it for publish, or run it "
                "where the network is (publish.where: login)"
            )
        status = error.response.status_code if isinstance(error, HfHubHTTPError) else None
        if status == 401:
            return RequestError(
                f"the Hub does not accept the token of {self.token.source}: {told}. Make a token "
                "with write access in the Hub's settings, then run publish again"
            )
        if status == 403:
            return RequestError(
                f"the token of {self.token.source} may not write to {repo}: {told}. Give it write "
                "access to that namespace, or change publish.repo_id"
            )
        if status == 404:
            return RequestError(
                f"{repo} cannot be found on {self.api.endpoint}: {told}. Check publish.repo_id and "
                "publish.branch, and that the token may see the repository"
            )
        if status in (400, 422) or isinstance(error, HFValidationError):
            return RequestError(f"cannot {what} at {repo}: the request is refused: {told}")
        tries = "" if attempts == 1 else f" after {attempts} attempts"
        if status in (409, 412):
            return StageError(
                f"cannot {what} at {repo}{tries}: others keep changing it: {told}. "
                "Run publish again when they are done"
            )
        return StageError(
            f"cannot {what} at {repo}{tries}: {told}. What was uploaded is kept; run publish again "
            "to finish it (on a machine that reaches the Hub: python -m yelp_hpc run publish)"
        )


def _chain(error: BaseException) -> Iterator[BaseException]:
    seen: BaseException | None = error
    while seen is not None:
        yield seen
        seen = seen.__cause__


def _root(error: BaseException) -> BaseException:
    """The fault itself: a failed upload is wrapped in a RuntimeError that says little."""
    for inner in _chain(error):
        if isinstance(inner, HfHubHTTPError | WaitTooLong) or _is_transport(inner):
            return inner
    return error


def _is_transport(error: BaseException) -> bool:
    """Whether it is a network fault of the client's HTTP library (httpx or its successor)."""
    library: Any = sys.modules.get(type(get_session()).__module__.partition(".")[0])
    kind = getattr(library, "TransportError", OSError)
    return isinstance(error, kind | ConnectionError)


def _passes(error: BaseException) -> bool:
    if isinstance(error, HfHubHTTPError):
        return error.response.status_code in RETRIED
    if isinstance(error, OfflineModeIsEnabled):
        return False
    # hf_xet, the Hub's block store, reports faults of the network as bare RuntimeError.
    return _is_transport(error) or type(error) is RuntimeError


def _asked_wait(error: BaseException) -> float | None:
    response = getattr(error, "response", None)
    return None if response is None else _retry_after(response)


def _retry_after(response: Any) -> float | None:
    value = response.headers.get("Retry-After", "")
    return float(value) if value.isdigit() else None


def _refuse_long_waits(response: Any) -> None:
    """The client would sleep for as long as a server asks, which is a job's whole time."""
    wait = _retry_after(response) if response.status_code in RETRIED else None
    if wait is not None and wait > LONGEST_WAIT:
        raise WaitTooLong(
            f"the Hub answered {response.status_code} and asks for a pause of {wait:.0f} s"
        )
