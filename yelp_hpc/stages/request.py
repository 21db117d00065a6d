"""A request for predictions, judged where it is made: nothing is written before all of it is sound.

Reads the run's markers and all of the input. Needs no torch, and no pyarrow for plain text.
"""

from __future__ import annotations

from pathlib import Path

from yelp_hpc.config import Config
from yelp_hpc.data.files import format_of
from yelp_hpc.data.formats.endings import BINARY_FORMATS
from yelp_hpc.data.output import output_problems
from yelp_hpc.errors import RequestError, all_problems
from yelp_hpc.inference.answers import answer_names
from yelp_hpc.progress import say
from yelp_hpc.rundir.files import damaged_files, read_object, sha256_file
from yelp_hpc.rundir.modes import refuse_foreign
from yelp_hpc.rundir.origin import require_own_adapter
from yelp_hpc.rundir.paths import RunPaths
from yelp_hpc.rundir.request import Request, adapter_sha256, read_request
from yelp_hpc.stages.rows import named_inputs, scan

_LARGE = 50e6  # bytes that take seconds to read


def make_request(
    run: RunPaths,
    config: Config,
    *,
    model: str,
    source: str,
    out: str,
    prefix: str = "",
    text_column: str | None = None,
    label_column: str | None = None,
    header: bool | None = None,
    answers_only: bool = False,
) -> tuple[Request, str]:
    """What is asked for, and a note for the user ("" without one).

    Args:
        text_column, label_column, header: None for what the run's own data have.

    Raises:
        RequestError: the adapter is missing or damaged, the run's answers are written ones and
            `answers_only` is asked for, the input cannot be answered (every faulty
            row is named), the output cannot be written or holds somebody else's file.
        StageError: the adapter is not the run's own.
    """
    target = Path(out).expanduser()
    said: list[str] = []  # whole messages, of the input and of what lies where it is written
    problems = [f"--out {problem}" for problem in output_problems(target)]
    if target.exists() and Path(source).exists() and target.samefile(source):
        problems.append(f"--out {out} is the input itself; name another file")
    writable = not problems
    if answers_only and config.infer.mode == "generate":
        problems.append(
            f"--answers-only: {run.root} has the model write its answers (infer.mode: generate), "
            "without probabilities as it is; leave the option out"
        )
    if model == "tuned":
        damaged = damaged_files(run.adapter)
        if damaged:
            problems.append(
                f"{run.root} has no finished adapter ({'; '.join(damaged)}): train it, or ask "
                "--model base"
            )
        else:
            require_own_adapter(run, config)
    try:
        files = named_inputs(source)
    except RequestError as error:
        raise _refusal(problems, [str(error)]) from None
    size = sum(path.stat().st_size for path in files.values())
    if size > _LARGE:
        say(f"predict: looking at every row of {source} ({size / 1e6:,.0f} MB)")
    own = config.data.source == "file"
    record = read_object(run.run_json)
    request = Request(
        run=str(run.root),
        model=model,
        adapter_sha256=adapter_sha256(run) if model == "tuned" else "",
        base_fingerprint=str((record.get("model") or {}).get("fingerprint") or ""),
        input=str(Path(source).expanduser().absolute()),
        sha256={name: sha256_file(path) for name, path in files.items()},
        text_column=text_column or (config.data.text_column if own else "text"),
        label_column=label_column or (config.data.label_column if own else "label"),
        label_needed=label_column is not None,
        header=(config.data.header if own else True) if header is None else header,
        escaped=own and config.data.escaped,
        out=str(Path(out).expanduser().absolute()),
        prefix=prefix,
        answers_only=answers_only,
        class_names=(record.get("data") or {}).get("class_names"),
    )
    note = ""
    try:
        found = scan(request, config.task, answer_names(request.config(config, 1), prefix))
        if found.why_unlabelled:
            note = f"no metrics: {found.why_unlabelled}"
    except RequestError as error:
        said.append(str(error))
    except ModuleNotFoundError:
        if all(format_of(path) not in BINARY_FORMATS for path in files.values()):
            raise
        note = "the input is looked at on the node: pyarrow is not installed here"
    for path in (Path(request.out), request.metrics) if writable else ():
        try:
            refuse_foreign(
                path, lambda _: read_request(RunPaths(request.folder)).out == request.out
            )
        except RequestError as error:
            said.append(str(error))
    if problems or said:
        raise _refusal(problems, said)
    return request, note


def _refusal(problems: list[str], said: list[str]) -> RequestError:
    first = [all_problems("nothing was submitted or written:", problems)] if problems else []
    return RequestError("\n".join([*first, *said]))
