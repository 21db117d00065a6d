"""report.html: self-contained, escaped, and opened by a real browser in both colour schemes."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from tests.fabricated import config_of, make_run, write_shards, write_test_set
from yelp_hpc.config import Config
from yelp_hpc.evaluation import charts
from yelp_hpc.evaluation.outcome import figure, interval, outcome_rows, print_outcome, share
from yelp_hpc.rundir.paths import RunPaths
from yelp_hpc.stages.collect import collect

BROWSER = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run, config = make_run(tmp_path_factory.mktemp("run"))
    collect(run, config)
    return run.report


class Tags(HTMLParser):
    def __init__(self, text: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (0.5, "0.500"), (0.0, "0.000"), (1.0, "1.000"), (0.99996, "0.99996"), (0.9996, "0.9996"),
        (0.00002, "0.00002"), (1.00004, "1.00004"), (1e-12, "0.000"), (1 - 1e-12, "1.000"),
        (-0.00002, "-0.00002"), (50_000, "50,000"), (None, "–"),
    ],
)  # fmt: skip
def test_what_is_neither_none_nor_all_is_not_shown_as_such(value: Any, shown: str) -> None:
    assert figure(value) == shown
    if isinstance(value, float):
        assert interval([value, 0.5]) == f"[{shown}, 0.500]"


def test_a_share_of_few_rows_is_not_none() -> None:
    shown = [share(part, 50_000) for part in (0, 2, 6_250, 49_998, 50_000)]
    assert shown == ["0.0%", "0.004%", "12.5%", "99.996%", "100.0%"]


def test_the_page_needs_nothing_but_itself(page: Path) -> None:
    text = page.read_text()
    for tag, attributes in Tags(text).found:
        assert tag not in ("script", "iframe", "object", "embed")
        if tag == "link":
            assert attributes["href"] == "data:,"
        assert "src" not in attributes and not any(name.startswith("on") for name in attributes)
    assert not re.search(r"url\(|@import|https?://", text)


def test_every_picture_has_a_text_alternative(page: Path) -> None:
    pictures = [a for tag, a in Tags(page.read_text()).found if tag == "svg"]
    assert len(pictures) == 8  # two confusions, two calibrations, three curves, the timeline
    for attributes in pictures:
        assert attributes["role"] == "img"
        assert len(attributes["aria-label"] or "") > 30


def test_every_section_is_there(page: Path) -> None:
    text = page.read_text()
    for title in ("Outcome", "Confusion and calibration", "Training",
                  "Jobs", "Throughput", "Mistakes, tuned", "Provenance"):  # fmt: skip
        assert f"<h2>{title}</h2>" in text
    assert text.count("the time limit came near") == 1
    assert "The two F1 conventions" not in text and "0.579" not in text  # nothing was stray
    for term, value in (("model", "some/model"), ("data", "demo"), ("rows", "400 test"),
                        ("seed", "42"), ("made", "2026-01-01T00:00:00Z"),
                        ("code", "0" * 12)):  # fmt: skip
        assert f"<dt>{term}</dt><dd>{value}</dd>" in text


def test_the_study_stands_beside_stray_answers_and_its_own_data(tmp_path: Path) -> None:
    run, config = make_run(tmp_path / "own")
    record = json.loads(run.run_json.read_text())
    record["config"]["resolved"]["data"] |= {"source": "hub", "path": "Yelp/yelp_review_full"}
    run.run_json.write_text(json.dumps(record))
    collect(run, config)
    labels = [0, 1, 2, 3, 4] * 20
    stray, stray_config = RunPaths(tmp_path / "stray"), config_of(models=["tuned"])
    write_test_set(stray, labels)
    write_shards(stray, "tuned", labels, [10, *labels[1:]])
    collect(stray, stray_config)
    for page in (run.report, stray.report):
        text = page.read_text()
        assert text.count("<h2>The two F1 conventions</h2>") == 1 and "0.579" in text
        assert text.count("A student's report") == 1  # what it is, once
        assert text.count("F1 macro, report&#39;s way") == 1


def test_the_smoothed_line_keeps_up_with_the_curve() -> None:
    curve = [3.0 - 0.01 * i for i in range(200)]
    assert charts.smooth(curve) == pytest.approx(curve)  # a slope is kept, at both ends too
    noisy = [y + (0.5 if i % 2 else -0.5) for i, y in enumerate(curve)]
    apart = [abs(a - b) for a, b in zip(charts.smooth(noisy), curve, strict=True)]
    assert max(apart[10:-10]) < 0.05 and max(apart) < 0.25
    fall = [2.0] * 100 + [1.0] * 100
    met = next(i for i, y in enumerate(charts.smooth(fall)) if y < 1.5)
    assert abs(met - 100) <= 1
    assert charts.smooth([]) == [] and charts.smooth([1.0]) == [1.0]


def test_a_fall_of_the_loss_by_orders_can_be_read_to_its_end() -> None:
    loss = [(float(i), 8.0 / i) for i in range(1, 201)]
    chart = charts.lines("Loss", {"each step": loss}, "optimizer step", "loss", wide_range=True)
    assert "loss (log scale)" in chart
    assert charts.log_ticks(0.04, 8.0) == pytest.approx([0.05, 0.1, 0.2, 0.5, 1, 2, 5])
    flat = charts.lines("Loss", {"each step": [(1.0, 2.0), (2.0, 1.0)]}, "step", "loss", True)
    assert "log scale" not in flat and ">loss<" in flat and ">step<" in flat


def test_text_from_data_is_escaped(page: Path) -> None:
    text = page.read_text()
    assert "&lt;b&gt;&amp;amp; so on&lt;/b&gt;" in text
    assert "out of memory &lt;script&gt;" in text


def test_a_class_may_be_called_as_what_is_no_class() -> None:
    columns = ["unparsed", "outside 0-1", "unparsed", "outside 0-1"]
    drawn = charts.confusion("tuned", [[1, 2, 3, 4]] * 2, columns)
    titles = re.findall(r"<text[^>]*>(.*?)</text>", drawn)
    assert titles[2:6] == ["unparsed", "outside 0…", "none", "other"]


@pytest.mark.parametrize("classes", [5, 12, 300])
def test_classes_that_begin_alike_are_told_apart(classes: int) -> None:
    columns = [f"a label of number {i}" for i in range(classes)]
    drawn = charts.confusion("tuned", [[1] * (classes + 1)] * classes, [*columns, "unparsed"])
    rows = re.findall(r'<text[^>]*text-anchor="end"[^>]*>(.*?)</text>', drawn)[1:]
    assert len({*rows}) == len(rows) > 4
    assert rows[0].endswith("r 0")


def test_many_classes_are_folded_and_equal_shares_are_one_sentence(tmp_path: Path) -> None:
    run, classes = RunPaths(tmp_path / "run"), 60
    task = {"labels": [f"class {i}" for i in range(classes)], "noun": "text"}
    config = Config.model_validate({**config_of(models=["base"]).model_dump(), "task": task})
    labels = list(range(40))
    write_test_set(run, labels)
    write_shards(run, "base", labels, labels)
    metrics = collect(run, config)
    page = run.report.read_text()
    assert "<summary>base: 60 classes</summary>" in page and page.count("class 59</td>") == 1
    said = "Every label that occurs has 2.5% of the rows: always answering one gets accuracy 0.025"
    assert said in page and metrics["test"]["absent"][0] == "class 40"


def test_a_run_with_nothing_but_predictions_gets_a_page(tmp_path: Path) -> None:
    run, config = RunPaths(tmp_path), config_of(models=["base"])
    labels = [0, 1, 2, 3, 4]
    write_test_set(run, labels)
    write_shards(run, "base", labels, [None, None, 7, 3, None])
    collect(run, config)
    text = run.report.read_text()
    assert "Answers that could not be parsed, base" in text
    assert "<h2>Jobs</h2>" not in text and "<h2>Training</h2>" not in text


def test_ticks_are_round_and_inside() -> None:
    assert charts.ticks(0, 10) == [0, 2, 4, 6, 8, 10]
    assert charts.ticks(3, 3) == [3]
    assert all(0.1 <= t <= 0.9 for t in charts.ticks(0.1, 0.9))
    assert [charts.short(v) for v in (0, 5e-4, 0.25, 1200, 12_345, 2_500_000)] == [
        "0", "5e-4", "0.25", "1.2k", "12.3k", "2.5M"]  # fmt: skip


def test_a_long_log_is_thinned_without_losing_its_mean() -> None:
    points = [(float(i), float(i % 3)) for i in range(30_000)]
    thinned = charts.thin(points)
    assert len(thinned) == 300
    assert sum(y for _, y in thinned) / 300 == pytest.approx(1.0)


@pytest.mark.skipif(BROWSER is None, reason="no headless browser: apt install chromium")
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_browser_opens_it_without_an_error_or_a_request(
    page: Path, tmp_path: Path, scheme: str
) -> None:
    """Measures inside the page at 390 px and writes what it found into the document."""
    probe = tmp_path / "probe.html"
    probe.write_text(f"""<iframe id="f" width="390" height="4000" src="{page.as_uri()}"></iframe>
<pre id="out">not loaded</pre><script>
const frame = document.getElementById("f");
frame.onload = () => {{
  const d = frame.contentDocument, w = frame.contentWindow;
  const card = w.getComputedStyle(d.querySelector(".card")).backgroundColor;
  const wide = d.documentElement.scrollWidth;
  const drawn = s => s.getBoundingClientRect().height > 50;
  const pictures = [...d.querySelectorAll("svg")].filter(drawn);
  const requests = w.performance.getEntriesByType("resource").length;
  document.getElementById("out").textContent =
    `card=${{card}} wide=${{wide}} pictures=${{pictures.length}} requests=${{requests}}`;
}};
</script>""")
    assert BROWSER is not None
    preferred = "0" if scheme == "dark" else "1"
    done = subprocess.run(
        [BROWSER, "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage",
         "--allow-file-access-from-files", "--enable-logging=stderr", "--virtual-time-budget=4000",
         f"--blink-settings=preferredColorScheme={preferred}",
         f"--user-data-dir={tmp_path / 'profile'}", "--dump-dom", probe.as_uri()],
        capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    found = re.search(r"card=(.*?) wide=(\d+) pictures=(\d+) requests=(\d+)", done.stdout)
    assert found, done.stdout[-500:] + done.stderr[-2000:]
    assert found[1] == ("rgb(28, 30, 36)" if scheme == "dark" else "rgb(255, 255, 255)")
    assert int(found[2]) <= 390  # nothing sticks out at a phone's width
    assert int(found[3]) == 8
    assert int(found[4]) == 0
    errors = [line for line in done.stderr.splitlines() if ":CONSOLE" in line]
    assert errors == []


def test_the_table_fits_80_columns_and_uses_120(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run, config = make_run(tmp_path / "run")
    metrics = collect(run, config)
    shown = {}
    for width in (80, 120):
        monkeypatch.setenv("COLUMNS", str(width))
        capsys.readouterr()
        print_outcome(metrics)
        shown[width] = capsys.readouterr().out
        assert max(map(len, shown[width].splitlines())) <= width
        for title in ("mean absolute error (stars)", "calibration error (ECE)", "tuned − base"):
            assert title in shown[width], shown[width]  # no word is broken
    assert "±" in shown[80] and "[" not in shown[80] and "[" in shown[120]
    assert "report's way" not in shown[80]  # every answer was one of the labels
    print_outcome(metrics, {"path": "Yelp/yelp_review_full"})
    assert capsys.readouterr().out.count("report's way") == 3  # the report's own data
    monkeypatch.setenv("COLUMNS", "0")  # as some shells inside an editor have it
    print_outcome(metrics)
    assert "tuned − base" in capsys.readouterr().out


def test_steps_of_more_than_a_star_are_classes(tmp_path: Path) -> None:
    run, config = make_run(tmp_path / "run", rows=50)
    names = ("1 star", "2 stars", "3 stars", "4 stars", "9 stars")
    task = config.task.model_copy(update={"names": names})
    metrics = collect(run, config.model_copy(update={"task": task}))
    titles = [title for title, *_ in outcome_rows(metrics, study_shown=False)]
    assert "mean absolute error (classes)" in titles and "within one class" in titles
    assert (task.unit, config.task.unit) == ("class", "star")
