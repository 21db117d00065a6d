"""An error in a rank is one message: no traceback, and the exit code that it asks for."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from yelp_hpc.errors import RequestError, StageError, YelpHpcError
from yelp_hpc.ranks.launch import Rendezvous, launch, rank_environment

RANK = """
import os, sys
from yelp_hpc.errors import RequestError, StageError
from yelp_hpc.ranks.rank import run_rank

def work(stop):
    {work}

os._exit(run_rank(work))
"""


@pytest.mark.parametrize(
    ("work", "kind", "says"),
    [
        ("raise RequestError('lora.target is wrong')", RequestError, "lora.target is wrong"),
        ("raise NotImplementedError('no such kernel')", RequestError, "no such kernel"),
        ("raise NotImplementedError", RequestError, "NotImplementedError"),
        ("raise StageError('the disk is full')", StageError, "the disk is full"),
        ("raise ValueError('odd')", StageError, "ValueError: odd"),
    ],
)
def test_an_error_in_a_rank_is_one_message(
    work: str,
    kind: type[YelpHpcError],
    says: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "train-rank-0.log").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(kind, match=says) as error:
        launch([sys.executable, "-c", RANK.format(work=work)], b"", 2, tmp_path)
    assert "Traceback" not in str(error.value) + capsys.readouterr().err
    assert not (tmp_path / "elsewhere").exists(), "a link was followed"
    logs = [path.read_text() for path in tmp_path.glob("train-rank-*.log")]
    assert any(says in log for log in logs)
    assert any("Traceback" in log for log in logs) is (kind is StageError)


TWICE = """
import os, signal, sys, threading
from pathlib import Path
from yelp_hpc.errors import SavedForRequeue
from yelp_hpc.ranks.launch import launch

def second(frame, event, arg):
    if event == "line" and frame.f_code.co_name == "set":
        os.kill(os.getpid(), signal.SIGUSR2)
    return second

threading.Timer(1, os.kill, (os.getpid(), signal.SIGTERM)).start()
sys.settrace(second)
try:
    launch([sys.executable, "-c", sys.argv[1]], b"", 2, Path(sys.argv[2]))
except SavedForRequeue as error:
    print(error)
"""


def test_a_second_signal_inside_the_handler_of_the_first_hangs_nothing(tmp_path: Path) -> None:
    """As when Slurm signals every process, and the supervisor passes its own one on."""
    rank = RANK.format(work="import time; time.sleep(60)")
    done = subprocess.run(
        [sys.executable, "-c", TWICE, rank, str(tmp_path)],
        capture_output=True,
        text=True,
        timeout=50,
        check=True,
    )
    assert done.stdout == "the training state is saved; run the same command again\n"


TOGETHER = """
import os, sys
from yelp_hpc.errors import RequestError
from yelp_hpc.ranks.rank import run_rank

def work(stop):
    from yelp_hpc.ranks.world import join_world
    guilty = os.environ["RANK"] in "{ranks}"
    if guilty and "{when}" == "before":
        raise {kind}("precision is wrong")
    world = join_world()
    if guilty:
        raise {kind}("precision is wrong")
    import torch
    while True:
        world.sum(torch.ones(4))

os._exit(run_rank(work))
"""


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize(
    ("ranks", "kind"), [("0", "RequestError"), ("1", "NotImplementedError"), ("01", "RequestError")]
)
def test_a_request_error_is_one_message_whoever_raises_it_before_or_after_they_met(
    ranks: str, kind: str, when: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The others lose their peer, or wait for one that never comes: nobody hears of that."""
    code = TOGETHER.format(ranks=ranks, kind=kind, when=when)
    with pytest.raises(RequestError, match=rf"^rank [{ranks}]: precision is wrong\n") as error:
        launch([sys.executable, "-c", code], b"", 2, tmp_path)
    assert str(error.value).count("precision is wrong") == 1
    assert capsys.readouterr().err.strip() == ""


@pytest.mark.parametrize(
    ("given", "threads"),
    [(None, "3"), ("2", "2"), ("4,2", "4"), ("", "3"), ("0", "3"), ("many", "3"), ("9" * 40, "3")],
)
def test_threads_are_a_number_whatever_the_shell_says(given: str | None, threads: str) -> None:
    """A list is OpenMP's own, one number a nested level; the rest is a slip of a shell."""
    environ = {} if given is None else {"OMP_NUM_THREADS": given}
    place = Rendezvous(1, 0, "127.0.0.1", 1)
    assert rank_environment(place, 0, 2, 6, environ)["OMP_NUM_THREADS"] == threads
