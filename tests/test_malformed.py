"""Malformed configs, arguments, data files, run directories, cluster files: one message each.

Every case goes through the real command line. It must end with the right exit code, name the
offending thing, show no traceback and leave every file as it was.
"""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from yelp_hpc.cli.main import main
from yelp_hpc.config import load_config
from yelp_hpc.rundir.files import write_json, write_marker
from yelp_hpc.rundir.manifest import record_run

GOOD = {"model": {"path": "m"}, "data": {"source": "file", "train": "r.csv", "test_rows": 2}}
WRONG_VALUES = json.dumps(
    {
        "config": {
            "resolved": {
                **GOOD,
                "train": {"epochs": "many"},
                "infer": {"shards": 0},
                "lora": {"ranks": 8},
            }
        }
    }
)
ROWS = "label,text\n" + "".join(f"{i % 5},review number {i}\n" for i in range(20))


@dataclass(frozen=True)
class Case:
    name: str
    arguments: str
    """Of the command line; split at spaces."""
    expected: tuple[str, ...]
    """What the message must contain."""
    files: dict[str, str | bytes] | None = None
    """Written before: path → content; a path that ends with / is a folder."""
    code: int = 2
    run: dict[str, object] | None = None
    """Settings of `data` of the run directory `run` that is made before; None: no run directory."""
    prepare: Callable[[Path], None] | None = None


def config(text: str | bytes, *expected: str, name: str = "") -> Case:
    label = name or expected[0]
    return Case(f"config: {label}", "config show --config c.yaml", expected, {"c.yaml": text})


def change(sets: str, *expected: str) -> Case:
    return Case(f"set: {sets}", f"config show --config good.yaml --set {sets}", expected)


def cluster(text: str, *expected: str) -> Case:
    arguments = "submit all --config good.yaml --run run --dry-run --cluster cl.yaml"
    return Case(f"cluster: {text[:30]!r}", arguments, expected, {"cl.yaml": text})


def arguments(line: str, *expected: str, code: int = 2) -> Case:
    return Case(f"arguments: {line}", line, expected, code=code)


def data(
    name: str, content: str | bytes, *expected: str, code: int = 2, **settings: object
) -> Case:
    return Case(
        f"data: {name} {expected[0]}",
        "run prepare --run run",
        (name, *expected) if not settings else expected,
        {name: content},
        code,
        {"train": name, **settings},
    )


def broken(
    line: str, files: dict[str, str | bytes], *expected: str, code: int = 2, label: str = ""
) -> Case:
    name = f"run directory: {label or next(iter(files), '')} {line}"
    return Case(name, line, expected, files, code, {})


def parquet(rows: Mapping[str, Sequence[object]]) -> bytes:
    sink = pa.BufferOutputStream()
    pq.write_table(pa.table(rows), sink)
    return bytes(sink.getvalue())


def marked(folder: str) -> Callable[[Path], None]:
    """Complete by its marker, but a file changed afterwards."""

    def change_after(root: Path) -> None:
        (root / folder).mkdir(parents=True)
        (root / folder / "adapter_model.safetensors").write_bytes(b"weights")
        write_marker(root / folder, ["adapter_model.safetensors"])
        (root / folder / "adapter_model.safetensors").write_bytes(b"other")

    return change_after


def prepared(root: Path) -> None:
    """A prepare/ that is whole, for what comes after it."""
    folder = root / "run" / "prepare"
    folder.mkdir(parents=True)
    table: dict[str, Sequence[object]] = {
        "row": [0, 1],
        "label": [0, 1],
        "text": ["a", "b"],
        "input_ids": [[1, 2], [1, 3]],
    }
    for split in ("train", "validation", "test"):
        (folder / f"{split}.parquet").write_bytes(parquet({**table, "length": [2, 2]}))
    write_json(folder / "tokens.json", {"prefix": [1], "label_ids": [5, 6, 7, 8, 9], "eos_id": 0})
    write_marker(folder, ["test.parquet", "train.parquet", "validation.parquet", "tokens.json"])


def prepared_with_altered_adapter(root: Path) -> None:
    prepared(root)
    marked("run/train/adapter")(root)


NESTED = "[" * 10_000
CASES = [
    # configs
    config("", "c.yaml is empty"),
    config("# nothing\n", "c.yaml is empty", name="comments only"),
    config("model: [", "c.yaml:1", "not YAML"),
    config("- a\n- b\n", "`key: value`"),
    config("just text", "`key: value`", name="text"),
    config(b"\xff\xfe\x00\x01", "c.yaml", "not UTF-8", name="bytes"),
    config("model: {path: m}\0", "c.yaml", name="a NUL byte"),
    config("model:\n\tpath: m\n", "c.yaml:2", name="tab"),
    config("a: 1\n---\nb: 2\n", "c.yaml", "document"),
    config("a: &a [*a]\n", "unknown key a", name="an alias to itself"),
    config("a: &a {b: *a}\n", "nested too deeply", name="a section inside itself"),
    config("a: *b\n", "c.yaml:1", "alias"),
    config("model: !!python/object:os.system {}\n", "c.yaml:1", "python/object"),
    config("? [a, b]\n: 1\n", "c.yaml:1", name="a list as a key"),
    config("1: 2\n", "c.yaml", "1", name="a number as a key"),
    config("<<: 3\n", "c.yaml:1", name="a merge of nothing"),
    config(f"a: {NESTED}", "c.yaml", "nested too deeply"),
    config("data: {source: demo}\n", "model is missing"),
    config("model: {path: m}\n", "data is missing"),
    config("model: m\ndata: {source: demo}\n", "c.yaml:1", "model", name="a text as a section"),
    config("model: {path: m}\ndata: null\n", "c.yaml:2", "data", name="a null section"),
    config(
        "model: {path: m}\ndata: {source: demo}\ntrian: {epochs: 2}\n", "c.yaml:3", "mean train"
    ),
    config("model: {path: m}\nmodel: {path: n}\ndata: {source: demo}\n", "written twice"),
    config("model: {path: m}\ndata: {source: web}\n", "data.source", "'web'"),
    config("model: {path: m}\ndata: {source: hub}\n", "data.path"),
    config("model: {path: m}\ndata: {source: file}\n", "data.train"),
    config("model: {path: m}\ndata: {source: demo}\nname: 'a b'\n", "c.yaml:3", "name"),
    Case("config: a folder", "config show --config d", ("d cannot be read",), {"d/": ""}),
    Case("config: no such", "config show --config gone.yaml", ("gone.yaml does not exist",)),
    Case("config: a near one", "config show --config godo.yaml", ("did you mean", "good.yaml")),
    # values
    change("seed", "'seed'", "section.key=value"),
    change("=1", "section.key=value"),
    change("lora..rank=1", "section.key=value"),
    change("seed.x=1", "seed"),
    change("lora.rank=[", "lora.rank", "YAML"),
    change(f"lora.rank={NESTED}", "lora.rank", "nested too deeply"),
    change("lora.rank=many", "lora.rank", "'many'"),
    change("lora.rank=0", "lora.rank", "greater than or equal to 1"),
    change("lora.target=[]", "lora.target"),
    change("lora.dropout=1", "lora.dropout", "less than 1"),
    change("train.learning_rate=.nan", "train.learning_rate"),
    change("train.learning_rate=.inf", "train.learning_rate"),
    change("train.save_every_minutes=.inf", "train.save_every_minutes"),
    change("train.adam_betas=[0.9]", "train.adam_betas"),
    change("train.adam_betas=[0.9,1.5]", "train.adam_betas"),
    change("train.max_tokens=1e99", "train.max_tokens"),
    change("seed=-1", "seed"),
    change("seed=99999999999999999999999", "seed"),
    change("infer.models=[]", "infer.models"),
    change("infer.models=[base,base]", "infer.models"),
    change("infer.shards=0", "infer.shards"),
    change("prompt.template=hello", "{review}"),
    change("prompt.template={review}{label}{label}", "{label}"),
    change("data.cutoff=8", "data.cutoff"),
    change("publish.repo_id=me", "owner/name"),
    # cluster files
    cluster("", "cl.yaml is empty"),
    cluster("trian: {gpus: 1}\n", "cl.yaml:1", "mean train"),
    cluster("train: {time: 4 hours}\n", "train.time", "D-H:M:S"),
    cluster("train: {memory: 64 GB}\n", "train.memory"),
    cluster("train: {gpus: -1}\n", "train.gpus"),
    cluster("train: {gpus: two}\n", "train.gpus", "'two'"),
    cluster('train: {partition: "a\\nb"}\n', "train.partition", "line breaks"),
    cluster("train: {sbatch: {signal: USR1}}\n", "signal", "launchers"),
    cluster('train: {sbatch: {"wrap\\n": x}}\n', "wrap", "no sbatch option"),
    cluster("train: {sbatch: {--mem: 3G}}\n", "--mem", "dashes"),
    cluster("container: {nv: true}\n", "container.image"),
    cluster("container: {image: a.sif}\ncommand: [x]\n", "container or command"),
    cluster("container: {image: a.sif, env: ['A=B']}\n", "container.env"),
    cluster("max_array_size: 1\n", "max_array_size"),
    Case(
        "cluster: no such",
        "submit all --config good.yaml --run run --dry-run --cluster gone.yaml",
        ("gone.yaml does not exist",),
    ),
    # arguments
    arguments("submti all", "No such command", "submti"),
    arguments("submit everything --config good.yaml --run r", "everything"),
    arguments("submit all --run r", "--config"),
    arguments("status", "--run"),
    arguments("status --run good.yaml", "good.yaml"),
    arguments("status --run nowhere", "nowhere is not a run directory"),
    arguments("status --run nowhere --jsn", "--jsn"),
    arguments("logs --run nowhere --lines 0", "--lines", "0"),
    arguments("logs --run nowhere --lines many", "--lines", "many"),
    arguments("run infer --run nowhere --model best", "--model", "best"),
    arguments("run infer --run nowhere --shard -1", "--shard", "-1"),
    arguments("run infer --run nowhere --shard 2-1", "--shard", "2-1", "0-3"),
    arguments("run infer --run nowhere --shard 1,x", "--shard", "'x'", "0-3"),
    arguments("run train --run nowhere --shard 0", "--shard", "infer"),
    arguments("submit all --config good.yaml --run a,b --dry-run", "a,b", "','"),
    arguments("submit all --config good.yaml --run a%j --dry-run", "a%j", "'%'"),
    arguments("submit all --config good.yaml --run good.yaml --dry-run", "good.yaml"),
    arguments("submit all --config good.yaml --run good.yaml/x", "good.yaml is a file"),
    arguments("export --run nowhere --out x", "--merged"),
    arguments("reproduce --from gone.json --run r", "gone.json"),
    arguments("reproduce --from good.yaml --run r", "good.yaml"),
    arguments("completion powershell", "powershell"),
    arguments("plan --config good.yaml --gpu voodoo2", "voodoo2"),
    arguments("plan --config good.yaml --tokens 0", "--tokens"),
    arguments("reproduce --from nope --run new", "--from nope: there is no run.json; name one"),
    arguments(f"collect --run {'9' * 400}", "is too long a name"),
    *(
        arguments(f"plan --config good.yaml {option} {value}", option, "is no finite number")
        for option in ("--tokens", "--mtbf")
        for value in ("nan", "inf", "1e400")
    ),
    arguments("image build x.sif --lock gone.lock", "gone.lock"),
    # data files
    data("r.csv", "", "no rows"),
    data("r.csv", "label,text\n", "no rows"),
    data("r.csv", "a,b\n1,2\n", "no column text", "a, b"),
    data("r.csv", ROWS + "5,five stars\n", "line 22", "'5'"),
    data("r.csv", ROWS + "3.5,half\n", "line 22", "'3.5'"),
    data("r.csv", ROWS + ",nothing\n", "line 22", "label is empty"),
    data("r.csv", ROWS + "1,\n", "line 22", "text is empty"),
    data("r.csv", ROWS + "1\n", "line 22", "text is empty"),
    data("r.csv", ROWS + "1,good, but dear\n", "line 22", "more fields"),
    data("r.csv", ROWS + '1,"no end\n', "r.csv"),
    data("r.csv", "label,text,text\n1,a,b\n", "text", "twice"),
    data("r.csv", ROWS.encode() + b"1,caf\xe9\n", "not UTF-8", "line 22"),
    data("r.csv", ROWS.encode("utf-16"), "not UTF-8"),
    data("r.csv", "label,text\n" + "1,same\n" * 20, "label 1 only", test_rows=2),
    data("r.csv", ROWS, "test_rows asks for 900", test_rows=900),
    data("r.csv", ROWS, "train_rows asks for 900", train_rows=900),
    data("r.csv", ROWS, "balanced", balanced=True, test_rows=2, train_rows=18),
    data("r.csv", ROWS, "no column stars", label_column="stars"),
    data("r.txt", ROWS, ".csv"),
    data("r.csv/", "", "r.csv"),
    data("r.jsonl", '{"text": "a", "label": 1}\n{"text": ', "line 2", "not JSON"),
    data("r.jsonl", "[1, 2]\n", "line 1", "not a JSON object"),
    data("r.jsonl", '{"text": 7, "label": 1}\n', "line 1", "text"),
    data("r.jsonl", '{"text": "a", "label": true}\n', "line 1", "True"),
    data("r.jsonl", '{"text": "a", "label": NaN}\n', "line 1", "label"),
    data("r.jsonl", '{"text": "a \\ud800 b", "label": 1}\n', "line 1", "text"),
    data("r.jsonl", f'{{"text": {NESTED}\n', "line 1", "nested too deeply"),
    data("r.jsonl", '{"text": "a", "label": 1}\n{"txt": "b", "label": 1}\n', "line 2", "text"),
    data("r.parquet", b"PAR1 and then nothing", "cannot be read"),
    data("r.parquet", parquet({"text": ["a"] * 40, "label": [1] * 40})[:-40], "cannot be read"),
    data("r.parquet", parquet({"text": [], "label": []}), "no rows"),
    data("r.parquet", parquet({"text": ["a", None], "label": [1, 2]}), "row 1", "text is empty"),
    data("r.parquet", parquet({"text": ["a", "b"], "label": [1, 7]}), "row 1", "7"),
    data("r.parquet", parquet({"text": ["a", "b"], "label": [[1], [2]]}), "row 0", "label"),
    # models
    data("r.csv", ROWS, "m is not in the cache", code=1, test_rows=2),
    Case(
        "model: an empty folder",
        "run prepare --run run",
        ("m",),
        {"m/": "", "r.csv": ROWS},
        run={},
    ),
    Case("model: config.json", "plan --config good.yaml", ("config.json",), {"m/config.json": "{"}),
    Case(
        "model: a list as config.json",
        "plan --config good.yaml",
        ("config.json",),
        {"m/config.json": "[]"},
    ),
    Case(
        "model: no decoder",
        "plan --config good.yaml",
        ("m cannot be used: it has no tokenizer",),
        {"m/config.json": '{"model_type": "clip"}', "r.csv": ROWS},
    ),
    # run directories
    broken("status --run run", {"run/run.json": ""}, "run.json", label="empty"),
    broken("status --run run", {"run/run.json": '{"config": '}, "run.json", label="torn"),
    broken("status --run run", {"run/run.json": "[]"}, "run.json", label="a list"),
    broken("status --run run", {"run/run.json": "{}"}, "run.json", label="{}"),
    broken("status --run run", {"run/run.json": NESTED}, "run.json", label="nested"),
    *(
        Case(
            f"run directory: run.json with wrong values, {command.split(' ')[0]}",
            command,
            (
                "run.json cannot be used:",
                "run.json:1: train.epochs: input should be",
                "(got 'many')",
                "infer.shards: input should be greater than or equal to 1 (got 0)",
                "unknown key lora.ranks; did you mean lora.rank?",
            ),
            {"run/run.json": WRONG_VALUES},
            run={},
        )
        for command in (
            "status --run run",
            "run train --run run",
            "doctor --run run",
            "plan --run run",
            "reproduce --from run --run again",
            "reproduce --from run --run run --compare",
        )
    ),
    broken(
        "status --run run",
        {"run/run.json": json.dumps({"config": {"resolved": {**GOOD, "trian": {}}}})},
        "run.json",
        "trian",
        label="another version",
    ),
    broken(
        "submit all --config good.yaml --run run --executor local",
        {"run/run.json": "[]"},
        "run.json",
        label="submitted to",
    ),
    broken("run train --run run", {}, "run prepare first", label="nothing prepared"),
    broken("run infer --run run", {}, "run prepare first", code=1, label="nothing prepared"),
    broken("collect --run run", {}, "test.parquet", code=1, label="nothing inferred"),
    broken("logs --run run", {}, "no log yet", label="no logs"),
    broken("plan --compare --run run", {}, "nothing has happened", label="not run"),
    broken("plan --run run", {"run/plan.json": "{", "r.csv": ROWS}, "", code=2, label="torn plan"),
    broken("verify --run run", {}, "run does not hold", code=1, label="nothing there"),
    broken("export --run run --merged --out o", {}, "run train", label="no adapter"),
    broken(
        "run infer --run run",
        {"run/prepare/complete.json": "{"},
        "prepare",
        code=1,
        label="a torn marker",
    ),
    Case(
        "run directory: an altered adapter",
        "run infer --run run --model tuned",
        ("adapter_model.safetensors", "run train first"),
        code=1,
        run={},
        prepare=prepared_with_altered_adapter,
    ),
    Case(
        "run directory: a torn shard",
        "collect --run run",
        ("shard-0000-of-0001.parquet",),
        {"run/infer/base/shard-0000-of-0001.parquet": b"PAR1"},
        1,
        {},
        prepared,
    ),
    Case(
        "run directory: a shard beyond",
        "run infer --run run --shard 7",
        ("no shard 7", "0 to 0"),
        run={},
        prepare=prepared,
    ),
]

# What damages something that only informs: it is left out and the command goes on.
HARMLESS = [
    (
        "submissions.jsonl",
        "garbage\n[]\n{}\n" + '{"job": "1", "executor": "slurm"}\n{"name": "train"',
    ),
    ("train/log.jsonl", '{"step": "x"}\n{"loss": null}\n{"step": 3, "epoch": 0'),
    ("logs/attempts/train/1-0.json", "{"),
    (
        "logs/attempts/train/1-0.json",
        '{"name": "train", "job": "1", "restart": "x", "started": "y"}',
    ),
    ("logs/attempts/train/1-0.json", '{"unknown": 1}'),
    ("infer/.progress/base/shard-0000-of-0001.json", "{"),
    ("metrics.json", "{"),
    ("prepare/complete.json", "[]"),
]


def snapshot(root: Path) -> dict[str, str]:
    return {
        str(path.relative_to(root)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(root.rglob("*"))
        if path.is_file()
    }


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("YELP_HPC_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("PATH", str(tmp_path / "no-slurm-here"))
    (tmp_path / "good.yaml").write_text(json.dumps(GOOD))
    return tmp_path


def write(root: Path, files: dict[str, str | bytes]) -> None:
    for name, content in files.items():
        path = root / name
        if name.endswith("/"):
            path.mkdir(parents=True)
            continue
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())


def call(
    arguments: list[str], monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> tuple[int, str]:
    """Run the command line in this process; any other exception than its exit fails the test."""
    monkeypatch.setattr(sys, "argv", ["yelp_hpc", *arguments])
    capfd.readouterr()
    with pytest.raises(SystemExit) as ended:
        main()
    out, err = capfd.readouterr()
    return int(ended.value.code or 0), out + err


@pytest.mark.parametrize(
    "case", CASES, ids=[f"{n}-{case.name[:60]}" for n, case in enumerate(CASES)]
)
def test_one_message_the_right_code_and_nothing_lost(
    case: Case,
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    if case.run is not None:
        changes = [f"data.{key}={json.dumps(value)}" for key, value in case.run.items()]
        record_run(folder / "run", load_config(folder / "good.yaml", changes), "good.yaml", [])
    write(folder, case.files or {})
    if case.prepare:
        case.prepare(folder)
    before = snapshot(folder)

    code, output = call(case.arguments.split(" "), monkeypatch, capfd)

    assert code == case.code, output
    assert "Traceback" not in output and output.strip()
    for fragment in case.expected:
        assert fragment.strip("/") in output
    assert len(output) < 4000, "a message, not a flood"
    after = snapshot(folder)
    assert {name: after.get(name) for name in before} == before
    made = {name for name in after if name not in before and not name.startswith("cache/")}
    assert not made, "a refused request left something behind"


@pytest.mark.parametrize(("file", "content"), HARMLESS, ids=range(len(HARMLESS)))
@pytest.mark.parametrize(
    "command", ["status --run run", "status --run run --json", "cancel --run run"]
)
def test_a_damaged_record_takes_nothing_but_itself_away(
    file: str,
    content: str,
    command: str,
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    record_run(folder / "run", load_config(folder / "good.yaml"), "good.yaml", [])
    write(folder / "run", {file: content})
    before = snapshot(folder)
    code, output = call(command.split(" "), monkeypatch, capfd)
    # cancel alone needs Slurm's client: a job that was submitted may still run
    assert code == 0 or (command.startswith("cancel") and "squeue is not installed" in output)
    assert "Traceback" not in output
    assert snapshot(folder) == before
