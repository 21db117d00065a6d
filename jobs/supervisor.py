"""The process on the compute node: starts a stage, passes one signal on, decides what comes next.

Runs on the host's Python under submitit. Reads the cluster settings that the submission froze,
writes RUN/logs/NAME.log (the stage's output) and RUN/logs/attempts. It alone asks Slurm for a
requeue, so that an image needs no Slurm client; none of submitit's guesses about time limits,
preemption or pickles has a say: its signal handlers are replaced here.
"""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from types import FrameType

from yelp_hpc.errors import RequestError, SavedForRequeue, StageError, YelpHpcError
from yelp_hpc.jobs import slurm
from yelp_hpc.jobs.cluster import ClusterConfig
from yelp_hpc.jobs.container import command, stage_argv, stage_environment
from yelp_hpc.jobs.image import ready_image
from yelp_hpc.jobs.job import Job
from yelp_hpc.jobs.logs import START, tail
from yelp_hpc.jobs.progress import Fingerprint, digest, fingerprint, newest, shards_missing
from yelp_hpc.jobs.site.client import NoAnswer
from yelp_hpc.jobs.snapshot import private_pickles, read_settings, remove_torn_pickles
from yelp_hpc.jobs.train import write_trackers
from yelp_hpc.jobs.verdict import Verdict, judge, no_progress
from yelp_hpc.publishing.token import hub_token
from yelp_hpc.ranks.child import die_with_parent
from yelp_hpc.ranks.launch import rendezvous
from yelp_hpc.rundir import attempts
from yelp_hpc.rundir.attempts import Attempt
from yelp_hpc.rundir.manifest import load_run
from yelp_hpc.rundir.modes import PATIENCE, is_full, room_again
from yelp_hpc.rundir.node_faults import read_faults, this_node
from yelp_hpc.rundir.paths import RunPaths, Task
from yelp_hpc.rundir.study import take_shared
from yelp_hpc.runtime import CARDS, GIVEN_CARDS, open_log, use_programs

HEARTBEAT = 10.0
POLL = 0.2
LAST_CALL = 10.0
"""Seconds before the time limit at which a stage that is still saving is given up: Slurm refuses to
requeue a job that the limit has ended."""


class Stop:
    """Receives signals; passes SIGUSR2 on to the running child, once."""

    def __init__(self) -> None:
        self.signal: int | None = None
        self._child: subprocess.Popen[bytes] | None = None
        self._passed = False
        for number in (signal.SIGUSR2, signal.SIGUSR1, signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._receive)
        signal.signal(signal.SIGCONT, signal.SIG_DFL)
        # what came while Python started was held back (see executor.py); it is handled now
        held = {signal.SIGUSR2, signal.SIGUSR1, signal.SIGTERM}
        signal.pthread_sigmask(signal.SIG_UNBLOCK, held)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        # a local SIGTERM or SIGINT after SIGUSR2 turns "again" into "stop", so the last one counts
        if self.signal is None or number in (signal.SIGTERM, signal.SIGINT):
            self.signal = number
        self._pass_on()

    def time_is_up(self) -> None:
        """Have the stage save, as Slurm's own signal before the limit does."""
        self._receive(signal.SIGUSR2, None)

    def watch(self, child: subprocess.Popen[bytes] | None) -> None:
        """Pass what was and will be received on to this process; None: to nobody."""
        self._child, self._passed = child, False
        if child is not None and self.signal is not None:
            self._pass_on()

    def _pass_on(self) -> None:
        # to the one process, never to its group: as a user, a signal to every process kills the
        # image's squashfuse and the stage dies of SIGBUS before it has saved
        if self._child is not None and self._child.poll() is None and not self._passed:
            self._passed = True
            self._child.send_signal(signal.SIGUSR2)


def supervise(stage: str, run_dir: str, settings: str, model: str = "", task: str = "") -> None:
    """Run a stage, or the shards of an array task in one process, to a verdict.

    Ends the process with 0 when the work is done and with 75 when the job was requeued or stopped
    after saving: so submitit pickles no result, which on a full disk would fail what is done.

    Raises:
        StageError: it failed; the message ends with the last lines of the stage's log.
    """
    stop = Stop()
    paths = RunPaths(run_dir)
    private_pickles()
    frozen = read_settings(Path(settings))
    cluster = ClusterConfig.model_validate(frozen["cluster"])
    use_programs(cluster.programs)
    job = Job(stage, model, (attempts.task_of(task),))
    remove_torn_pickles(this_job())
    while True:
        verdict = _attempt(stop, paths, cluster, frozen.get("image_sha256"), job)
        _tell(f"{job.name}: {verdict.action}: {verdict.reason}")
        if verdict.action == "done":
            if stage == "train":
                write_trackers(paths)
            sys.exit(0)
        failed, end = verdict.action == "failed", time.monotonic() + PATIENCE + 30
        if verdict.action == "again":
            stop.signal = None
            continue
        # leave first and srun would end the leader, which may want a requeue of the whole job
        while not _leads() and time.monotonic() < end:
            if failed and stop.signal == signal.SIGTERM:
                break
            time.sleep(1)
        if failed:
            raise StageError(f"{job.name} failed: {verdict.reason}")
        sys.exit(SavedForRequeue.exit_code)  # 75 shows in sacct if the requeue did not take


def _attempt(
    stop: Stop, paths: RunPaths, cluster: ClusterConfig, image: str | None, job: Job
) -> Verdict:
    now = fingerprint(paths, job.stage, job.model, job.tasks[0])
    attempt = _begin(paths, cluster, job, now)
    leader = _leads()
    limit = slurm.TimeLimit(attempt.job, os.environ) if on_slurm() else None
    known = len(read_faults(paths))
    try:
        if leader:
            attempts.write(paths, attempt)
        if attempt.stalled > cluster.requeue_cap:
            verdict = Verdict("failed", f"started {attempt.stalled} times without any progress")
        else:
            if cluster.container:
                ready = ready_image(cluster.container, image)
                cluster = cluster.model_copy(update={"container": ready})
            for part in take_shared(paths):
                _tell(f"{job.name}: took {part} of another run of the study")
            verdict = _run(stop, paths, cluster, job, attempt, leader, limit)
    except YelpHpcError as error:
        verdict = Verdict("failed", str(error))
    said = verdict.reason.rpartition(START)[2]  # by this start
    full = verdict.action == "failed" and leader and is_full(paths.root, said)
    if full and attempt.stalled < cluster.requeue_cap:
        room = stop.signal is None and room_again(paths.root, lambda: stop.signal is not None)
        # time was up, perhaps while it saved: whoever starts next waits for room
        up = stop.signal in (signal.SIGUSR2, signal.SIGUSR1)
        if room or up:
            alone = os.environ.get("SLURM_JOB_NUM_NODES", "1") == "1"
            here = not on_slurm() or (alone and not up)  # a requeue begins all nodes anew
            action, why = "again" if here else "requeued", f"the disk was full; {verdict.reason}"
            verdict = Verdict(action, why, ask=not here)
    if new := [fault for fault in read_faults(paths)[known:] if verdict.action != "done"]:
        why = f"{verdict.reason}; node {new[-1]['node']} failed: {new[-1]['what']}"
        verdict = replace(verdict, reason=why)
    if leader:
        after = fingerprint(paths, job.stage, job.model, job.tasks[0])
        attempt.ended, attempt.verdict, attempt.reason = time.time(), verdict.action, verdict.reason
        if verdict.action != "done":
            kept = max(newest(after) or 0.0, attempt.started)
            attempt.lost = max(0.0, attempt.ended - kept)
        attempts.write(paths, attempt)
        if verdict.action == "requeued" and verdict.ask:
            verdict = _requeue(paths, cluster, attempt, verdict, limit)
    return verdict


def _begin(paths: RunPaths, cluster: ClusterConfig, job: Job, now: Fingerprint) -> Attempt:
    """The attempt that begins, with the account of earlier ones that were killed outright."""
    job_id = this_job()
    earlier, before = attempts.read(paths, job.name, job_id), digest(now)
    # another node may look after the leader has written this very start: it keeps no accounts
    for killed in attempts.killed(paths, job.name, job_id, job.tasks[0]) if _leads() else ():
        killed.ended, killed.verdict = attempts.last_seen(killed), "lost"
        killed.reason = "killed without a chance to save (node failure or no grace)"
        killed.lost = max(0.0, killed.ended - max(newest(now) or 0.0, killed.started))
        attempts.write(paths, killed)
    restart = max((attempt.restart + 1 for attempt in earlier), default=0)
    # the number of a process comes again, in a container at each start: that is no other try
    same = earlier and (on_slurm() or earlier[-1].verdict == "again") and _leads()
    stalled = earlier[-1].stalled + 1 if same and earlier[-1].before == before else 1
    nodes = int(os.environ.get("SLURM_JOB_NUM_NODES", 1)) if on_slurm() else 1
    # the cluster file's `sbatch` may ask for them in other words, as gpus-per-task
    given = os.environ.get("SLURM_GPUS_ON_NODE", "0") if on_slurm() else "0"
    gpus = (cluster.resources(job.stage).gpus or int(given)) * nodes
    return Attempt(
        *(job.name, job_id, restart, job.tasks[0], this_node(), os.getpid(), gpus),
        stalled=stalled,
        before=before,
    )


def _run(
    stop: Stop, paths: RunPaths, cluster: ClusterConfig, job: Job, attempt: Attempt, leader: bool,
    limit: slurm.TimeLimit | None,
) -> Verdict:  # fmt: skip
    """Run the stage's process until done, stopped or failed; one for all shards of the task."""
    env = {**os.environ}
    if on_slurm():
        if job.stage == "train":  # whatever the user's shell says of a master is another's
            place = rendezvous({name: env[name] for name in env if name.startswith("SLURM_")})
            env |= place.handed_on()
        # by the controller's clock, and fixed while the limit moves: the supervisor tells the stage
        env.pop("SLURM_JOB_END_TIME", None)
    else:  # inside an allocation, of several nodes perhaps, it still runs on this one alone
        env.setdefault("YELP_HPC_NNODES", "1")
        env[CARDS] = env.pop(GIVEN_CARDS, "")
    save = cluster.resources(job.stage).save
    log = paths.stage_log(job.name, job.tasks[0])
    if (node := env.get("YELP_HPC_NODE_RANK", "0")) != "0":
        log = log.with_name(f"{log.stem}-node{node}.log")
    token = None
    if job.stage == "publish":
        token = hub_token(env, load_run(paths.root)[1].publish.token_file)
    failed: list[str] = []
    shards, cap = _missing(paths, job, job.tasks[0]), cluster.requeue_cap
    while shards or not job.tasks[0]:
        arguments = stage_argv(job.stage, paths.root, job.model, shards)
        argv = command(cluster, paths.root, arguments, env)
        child_env = stage_environment(cluster, job.stage, env, token)
        code, ended = _process(stop, paths, argv, child_env, log, attempt, leader, job, limit, save)
        if ended and code != 0:
            stuck = attempt.stalled >= cap and not _moved(paths, job, attempt)
            if ended.action == "requeued" and stuck:
                return no_progress(ended.reason, attempt.stalled, tail(log))
            return ended
        # a refused or failed shard must not keep those after it in its task from being done
        if shards and code not in (0, SavedForRequeue.exit_code) and stop.signal is None:
            bad, *after = _missing(paths, job, shards) or shards[-1:]
            failed.append(f"shard {bad} exited {code}")
            shards = tuple(after)
            continue
        if code != 0:
            state = slurm.state_of(this_job()) if on_slurm() else "LOCAL"
            moved = _moved(paths, job, attempt)
            return judge(code, stop.signal, state, attempt.stalled, moved, cap, tail(log))
        break
    if failed:
        return Verdict("failed", f"{'; '.join(failed)}\n{tail(log)}")
    return Verdict("done", "complete")


def _missing(paths: RunPaths, job: Job, shards: Task) -> Task:
    """Which of the shards are not done."""
    missing = {*shards_missing(paths, load_run(paths.root)[1], job.model)} if shards else ()
    return tuple(shard for shard in shards if shard in missing)


def _moved(paths: RunPaths, job: Job, attempt: Attempt) -> bool:
    """Whether this attempt has changed anything that counts as progress."""
    return digest(fingerprint(paths, job.stage, job.model, job.tasks[0])) != attempt.before


def _process(
    stop: Stop, paths: RunPaths, argv: list[str], env: dict[str, str], log: Path,
    attempt: Attempt, leader: bool, job: Job, limit: slurm.TimeLimit | None, save: float,
) -> tuple[int, Verdict | None]:  # fmt: skip
    """Run one process to its end. Returns its exit code and, if it was ended here, why."""
    log.parent.mkdir(parents=True, exist_ok=True)
    head = f"{START}{attempt.job} restart {attempt.restart} on {attempt.node}: "
    try:
        opened = open_log(log, "ab", head + shlex.join(argv))
    except OSError as error:
        raise StageError(f"cannot write the log {log}: {error.strerror}") from None
    with opened as output:
        try:
            child = subprocess.Popen(
                argv,
                cwd=None if _is_somewhere() else paths.root,
                env=env,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                # its own session: Ctrl-C in a terminal reaches the supervisor alone
                start_new_session=True,
                preexec_fn=_begin_stage,
            )
        except OSError as error:
            raise StageError(f"cannot start {argv[0]}: {error.strerror}") from None
    stop.watch(child)
    beat, ended = time.monotonic(), None
    while True:
        with suppress(subprocess.TimeoutExpired):
            code = child.wait(POLL)
            break
        if time.monotonic() - beat > HEARTBEAT and leader:
            beat = time.monotonic()
            attempts.beat(paths, attempt)
            # a shard done twice is harmless
            other = None if job.stage == "infer" else attempts.newer(paths, attempt)
            if other and not ended:
                # this node was cut off and Slurm started the job elsewhere: only one may write
                why = f"job {other.job} took over on {other.node}; this copy was stopped"
                ended = Verdict("stopped", why)
                child.kill()
        if limit is None or ended:
            continue
        # the limit may have moved: it is asked again before anything is done about it
        if stop.signal is None and limit.left < save and limit.ask() < save:
            stop.time_is_up()
        if limit.left < LAST_CALL and leader and limit.ask() < LAST_CALL:
            why = "had not saved when the time limit came (raise save_seconds); the last save holds"
            ended = Verdict("requeued", why, ask=True)
            child.kill()
    stop.watch(None)
    return code, ended


def _is_somewhere() -> bool:
    """Whether the working directory is still there: MKL finds its libraries in no other case."""
    try:
        return bool(Path.cwd())
    except OSError:
        return False


def _requeue(
    paths: RunPaths,
    cluster: ClusterConfig,
    attempt: Attempt,
    verdict: Verdict,
    limit: slurm.TimeLimit | None,
) -> Verdict:
    """Ask for the requeue until somebody answers or the time limit comes."""
    why, action, pause = "requeue is off in the cluster file", "stopped", 1.0
    avoided = _elsewhere(paths, attempt) if cluster.requeue else ""
    while cluster.requeue:
        try:
            slurm.requeue(attempt.job)
        except RequestError:
            why = "this node has no scontrol to ask for a requeue"
            break
        except NoAnswer as error:
            if limit is not None and limit.left < pause:
                why = f"nobody answered the requeue until the time limit: {error}"
                break
            _tell(f"{error}; asked again in {pause:.0f} s")
            time.sleep(pause)
            pause = min(2 * pause, 20.0)
            continue
        except StageError as error:
            if slurm.state_of(attempt.job) in ("RUNNING", "UNREACHABLE"):
                action, why = "failed", f"the requeue was refused: {error}"
                break  # else preempted meanwhile, or heard before its client was ended
        if avoided:  # at once: Slurm takes it of a job that waits, and ends this one in seconds
            slurm.exclude(attempt.job, avoided)
        return verdict
    attempt.verdict = action
    attempt.reason = f"{verdict.reason}; {why}: submit again to go on"
    attempts.write(paths, attempt)
    return Verdict(action, attempt.reason)


def _elsewhere(paths: RunPaths, attempt: Attempt) -> str:
    """What the requeued job is to avoid: the nodes whose hardware failed under this run."""
    nodes = list(dict.fromkeys(str(fault["node"]) for fault in read_faults(paths)))
    try:
        return slurm.elsewhere(attempt.job, nodes) if nodes else ""
    except (StageError, RequestError) as error:
        _tell(f"{', '.join(nodes)} had a fault and cannot be left out: {error}")
        return ""


def _tell(text: str) -> None:
    with suppress(OSError):  # the job's own log may lie on a disk that is full
        print(text, flush=True)


def _begin_stage() -> None:
    """In the child: be killed when the supervisor is, so that nothing runs twice; hear signals."""
    die_with_parent()
    signal.pthread_sigmask(signal.SIG_SETMASK, [])


def on_slurm() -> bool:
    """Whether submitit started this process through Slurm."""
    return os.environ.get("SUBMITIT_EXECUTOR") == "slurm"


def _leads() -> bool:
    """Whether this is the one supervisor of the job that keeps its records and asks for it."""
    return not on_slurm() or os.environ.get("SLURM_PROCID", "0") == "0"


def this_job() -> str:
    """`123`, `123_4` or `local-PID`."""
    if not on_slurm():
        return f"local-{os.environ.get('SUBMITIT_LOCAL_JOB_ID', os.getpid())}"
    if array := os.environ.get("SLURM_ARRAY_JOB_ID"):
        return f"{array}_{os.environ['SLURM_ARRAY_TASK_ID']}"
    return os.environ["SLURM_JOB_ID"]
