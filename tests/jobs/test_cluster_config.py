"""The cluster's settings: what is refused, and how stages inherit the defaults."""

from __future__ import annotations

import getpass
from pathlib import Path

import pytest
import yaml

from yelp_hpc.cache import cache_folder
from yelp_hpc.errors import RequestError
from yelp_hpc.jobs.cluster import ClusterConfig, load_cluster, minutes, time_text

CONFIGS = Path(__file__).parents[2] / "configs" / "clusters"


@pytest.mark.parametrize("name", ["4x3090", "local", "test"])
def test_the_shipped_files_load(name: str) -> None:
    load_cluster(CONFIGS / f"{name}.yaml")


def test_a_stage_takes_the_defaults_that_it_does_not_set(tmp_path: Path) -> None:
    file = tmp_path / "c.yaml"
    file.write_text(
        "defaults: {partition: a, time: 1:30:00, sbatch: {nice: '5', comment: x}}\n"
        "train: {partition: b, sbatch: {comment: y}}\n"
    )
    train = load_cluster(file).resources("train")
    assert train.partition == "b"
    assert minutes(train.time or "") == 90
    assert train.sbatch == {"nice": "5", "comment": "y"}
    assert load_cluster(file).resources("collect").partition == "a"


def test_nodes_are_a_number_or_a_range_as_slurm_takes_it(tmp_path: Path) -> None:
    file = tmp_path / "c.yaml"
    for text, nodes, least in (
        ("3", 3, 3),
        ("1-4", "1-4", 1),
        ("'02-02'", 2, 2),
        ("null", None, 1),
    ):
        file.write_text(f"train: {{nodes: {text}}}\n")
        train = load_cluster(file).resources("train")
        assert (train.nodes, train.least_nodes) == (nodes, least)
    for text in ("0", "-2", "4-1", "1-", "two", "1.5", "'1-4\\n'", "true"):
        file.write_text(f"train: {{nodes: {text}}}\n")
        with pytest.raises(RequestError, match=r"train\.nodes"):
            load_cluster(file)


def test_every_problem_is_reported_at_once_with_the_nearest_key(tmp_path: Path) -> None:
    file = tmp_path / "c.yaml"
    file.write_text(
        "train: {partion: gpu, gpus: -1, time: soon}\n"
        'infer: {account: "a\\n#SBATCH --uid=0", sbatch: {signal: TERM}}\n'
        "contaner: {}\n"
    )
    with pytest.raises(RequestError) as caught:
        load_cluster(file)
    message = str(caught.value)
    for part in (
        *("train.partion; did you mean train.partition?", "contaner; did you mean container?"),
        *("train.gpus", "train.time", "infer.account", "signal is set by the launchers"),
    ):
        assert part in message


PLACES = {
    "python": "{0}/bin/python",
    "command": '["{0}/stage"]',
    "programs.squeue": "{0}/squeue",
    "container.image": "{0}/a.sif",
    "container.binds": '["{0}/data:/data:ro"]',
    "container.cache": "{0}/cache",
    "container.extra_args": '[--bind, "{0}"]',
    "defaults.sbatch.chdir": "{0}",
    "train.sbatch.nodefile": "{0}/nodes",
}


@pytest.mark.parametrize("key", PLACES)
def test_every_path_is_what_a_shell_would_make_of_it(
    key: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", "/h")
    monkeypatch.setenv("PROJECT", "/p")
    monkeypatch.delenv("USER", raising=False)  # not every login shell sets it
    file = tmp_path / "c.yaml"

    def load(place: str) -> str:
        image = ("container.image=/a.sif",) if key.startswith("container.") else ()
        file.write_text("{}")
        return load_cluster(file, (*image, f"{key}={PLACES[key].format(place)}")).model_dump_json()

    assert '"/h/x' in load("~/x") and '"/p/x' in load("$PROJECT/x") and '"/p' in load("${PROJECT}")
    assert f'"/scratch/{getpass.getuser()}' in load("/scratch/$USER")
    monkeypatch.setenv("YELP_HPC_CACHE", "~/cache")
    assert str(cache_folder()) == "/h/cache"
    monkeypatch.setenv("YELP_HPC_CACHE", "~nobody9/cache")
    with pytest.raises(RequestError, match="no user here"):
        cache_folder()
    monkeypatch.delenv("YELP_HPC_CACHE")
    for bad, says in (
        ("/scratch/$NOPE", r"\$NOPE is not set here"),
        ("~nobody9/x", "no user here"),
        ("/scratch/`id -un`", "more of a shell"),
        ("/scratch/$(id -un)", "more of a shell"),
        ("${PROJECT:-/x}", "more of a shell"),
    ):
        with pytest.raises(RequestError, match=says):
            load(bad)


@pytest.mark.parametrize("key", ["container.image", "container.cache"])
@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("/scratch/%u/x", "%u, which Slurm fills in"),
        ("/scratch/%j", "%j, which Slurm fills in"),
        ("'/scratch/x'", "quotes twice"),
        ("", "is empty"),
        (r"\$HOME/x", "names no variable"),
    ],
)
def test_a_path_that_would_make_an_odd_folder_is_refused(
    key: str, text: str, says: str, tmp_path: Path
) -> None:
    file, section = tmp_path / "c.yaml", {"image": "/a.sif", key.partition(".")[2]: text}
    file.write_text(yaml.safe_dump({"container": section}))
    with pytest.raises(RequestError, match=says):
        load_cluster(file)


@pytest.mark.parametrize(
    "section",
    [{"programs": {"squeue": ""}}, {"container": {"image": "/a.sif", "binds": [":/data"]}}],
)
def test_what_has_no_name_is_refused(section: dict[str, object], tmp_path: Path) -> None:
    file = tmp_path / "c.yaml"
    file.write_text(yaml.safe_dump(section))
    with pytest.raises(RequestError, match=r"has no name|names no folder"):
        load_cluster(file)


@pytest.mark.parametrize(
    ("text", "expected"),
    [("5", 5), ("5:30", 6), ("1:00:00", 60), ("2-0", 2880), ("1-1:30", 1530), ("1-1:00:01", 1501)],
)
def test_minutes_reads_slurms_times(text: str, expected: int) -> None:
    assert minutes(text) == expected


def test_what_is_written_for_slurm_is_read_back() -> None:
    assert [minutes(time_text(count)) for count in range(1, 5000)] == list(range(1, 5000))


@pytest.mark.parametrize(
    ("time", "given", "save"),
    [("1", None, 30), ("4", None, 120), (None, None, 120), ("1", 35, 35), ("2-0", 900, 900)],
)
def test_a_stage_is_told_to_save_before_its_limit(
    time: str | None, given: int | None, save: int
) -> None:
    settings = {"time": "7", "save_seconds": given} | ({"time": time} if time else {})
    cluster = ClusterConfig.model_validate({"defaults": settings})
    assert cluster.resources("train").save == save
