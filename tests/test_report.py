"""The report: its arithmetic, and the page itself in a real browser."""

import json
import math
import shutil
import time

import pytest

from subquad.bench import figures, report, units
from subquad.bench.results import Cells, Results, table

ENTRIES = ("softmax", "gla[heads=2]", "hybrid:3")


def _train(entry: str, task: str, i: int) -> dict:
    recall = task == "mqar"
    history = [
        {"step": s, "loss": 5 * math.exp(-s / (40 + 30 * i)) + 0.1} for s in range(0, 200, 10)
    ]
    return {
        "kind": "train",
        "entry": entry,
        "task": task,
        "spec": {"entry": entry},
        "metric": "accuracy" if recall else "loss",
        "higher_is_better": recall,
        "tokens": 128,
        "steps": 200,
        "parameters": 210_000 + 1000 * i,
        "mlp_dim": 128,
        "score": (0.99, 0.6, 0.95)[i] if recall else (2.0, 2.2, 1.9)[i],
        "state_bytes": (65536, 8192, 24576)[i],
        "history": history,
        "evals": [{"step": 200, "accuracy": 0.9}],
        "tokens_per_second": 1e4,
        "seconds": 10.0,
    }


def _speed(entry: str, i: int) -> dict:
    lengths = [256, 1024, 4096]
    return {
        "kind": "speed",
        "entry": entry,
        "spec": {"entry": entry},
        "lengths": lengths,
        "prefill": [(1e-8 * T * T, 4e-5 * T, 5e-9 * T * T + 1e-5 * T)[i] for T in lengths],
        "decode": [(1e-3 + 1e-6 * T, 2e-3, 1.5e-3 + 2e-7 * T)[i] for T in lengths],
        "peak": [(3000 * T, 2e6, 800 * T)[i] for T in lengths],
        "state": [(512 * T, 32768, 128 * T + 8192)[i] for T in lengths],
        "formula": {"state": [(512 * T, 32768, 128 * T + 8192)[i] for T in lengths]},
    }


@pytest.fixture
def results(tmp_path):
    found = Results(
        tmp_path / "results.json", order=list(ENTRIES), made={"subquad": "0", "torch": "2"}
    )
    for i, entry in enumerate(ENTRIES):
        for task in ("mqar", "text"):
            found.cells[f"train/{entry}/{task}"] = _train(entry, task, i)
        found.cells[f"speed/{entry}"] = _speed(entry, i)
    found.save()
    return found


def test_front_keeps_what_none_beats():
    points = [(4, 0.5), (1, 0.2), (2, 0.6), (8, 0.9), (3, 0.6)]
    assert figures.front(points, higher=True) == [(1, 0.2), (2, 0.6), (8, 0.9)]
    assert figures.front(points, higher=False) == [(1, 0.2)]
    assert figures.front([(1, 2.0), (2, 1.5), (2, 1.7)], higher=False) == [(1, 2.0), (2, 1.5)]


def test_crossing_is_where_the_curves_meet():
    x = [256, 1024, 4096, 16384]
    square, line = [1e-9 * T**2 for T in x], [2e-6 * T for T in x]
    assert figures.crossing(x, square, line) == pytest.approx(2000, rel=1e-6)
    assert figures.crossing(x, line, square) is None
    assert figures.crossing(x, line, [v / 2 for v in line]) is None
    # A touch on the way does not count, only where it stays below.
    assert figures.crossing([1, 2, 4, 8], [1, 1, 1, 1], [2, 0.5, 2, 0.5]) == pytest.approx(2**2.5)
    # Equal at a length: not a rounding below it, where the report would look for its neighbour.
    assert figures.crossing([1000, 2000], [3.0, 3.0], [3.0, 1.0]) == 1000


def test_ring_stands_on_both_curves(results):
    figure = figures.over_length(
        results, "prefill", "time", units.seconds, figures.seconds_axis, "faster"
    )
    (ring,) = (t for t in figure.data if t.mode == "markers" and t.legendgroup == "gla[heads=2]")
    assert ring.x[0] == pytest.approx(4000, rel=1e-3)
    assert ring.y[0] == pytest.approx(1e-8 * 4000**2, rel=1e-2)


def test_units():
    assert [units.bytes_(n) for n in (0, 512, 1536, 5 << 20)] == [
        "0 B",
        "512 B",
        "1.5 KiB",
        "5 MiB",
    ]
    assert [units.seconds(n) for n in (3e-6, 0.0021, 1.5, 600)] == [
        "3 us",
        "2.1 ms",
        "1.5 s",
        "10 min",
    ]
    assert units.count(212_345) == "212 k"
    assert units.flops(2e9) == "2 GFLOP"


def test_results_survive_the_disk(results):
    again = Results.load(results.path)
    assert again.cells == results.cells
    assert again.done("speed/softmax", {"entry": "softmax"})
    assert not again.done("speed/softmax", {"entry": "other"})
    assert not list(results.path.parent.glob("*.part"))


@pytest.mark.parametrize("content", ["{", "[]", '{"version": 99}'])
def test_foreign_results_are_refused(tmp_path, content):
    path = tmp_path / "results.json"
    path.write_text(content)
    with pytest.raises(ValueError, match=r"results\.json"):
        Results.load(path)


def test_table_marks_the_best(results):
    by_title = {column.title: column for column in report.columns(results)}
    assert by_title["mqar accuracy"].best == "softmax"
    assert by_title["text loss"].best == "hybrid:3"
    assert by_title["state at 4,096"].shown["gla[heads=2]"] == "32 KiB"
    assert report.table(results).row_count == len(by_title) == 9


def test_page_is_self_contained(results):
    page = report.html(results)
    body = page[page.index("<body>") :]
    for foreign in ("http://", "https://", "<script src", 'rel="stylesheet"'):
        assert foreign not in body.replace("https://plot.ly", "")


def test_partial_results_make_a_page(results):
    for name in list(results.cells):
        if not name.startswith("train/softmax"):
            del results.cells[name]
    assert report.html(results).count("<h2>") == 4


@pytest.fixture
def browser(tmp_path):
    chromium, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if chromium is None or driver is None:
        pytest.skip("no chromium and chromedriver on this machine")
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    for flag in (
        "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
        "--disable-background-networking", "--disable-component-update", "--disable-sync",
        "--disable-dev-shm-usage", "--window-size=1000,1400",
        f"--user-data-dir={tmp_path / 'chromium'}",
    ):  # fmt: skip
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    running = webdriver.Chrome(options=options, service=webdriver.ChromeService(driver))
    yield running
    running.quit()


def test_in_a_browser(results, browser):
    from selenium.webdriver.common.by import By
    from selenium.webdriver.support.ui import WebDriverWait

    path = report.write(results, results.path.with_name("report.html"))
    browser.get(path.as_uri())
    wait = WebDriverWait(browser, 20)
    drawn = "return [...document.querySelectorAll('.plotly-graph-div .main-svg')].length"
    wait.until(lambda b: b.execute_script(drawn) >= 8)
    plots = browser.find_elements(By.CLASS_NAME, "plotly-graph-div")
    assert len(plots) == len(list(report.sections(results))) == 8
    assert all(plot.find_elements(By.CSS_SELECTOR, ".trace") for plot in plots)

    curves = plots[1]
    browser.execute_script("arguments[0].scrollIntoView({block: 'center'})", curves)
    visible = "return arguments[0].data.map(t => t.visible ?? true)"
    assert browser.execute_script(visible, curves) == [True, True, True]
    curves.find_elements(By.CSS_SELECTOR, ".legendtoggle")[1].click()
    wait.until(lambda b: b.execute_script(visible, curves) == [True, "legendonly", True])
    # plotly takes a second click within 0.3 s for a double click, which isolates the series.
    time.sleep(0.6)
    curves.find_elements(By.CSS_SELECTOR, ".legendtoggle")[1].click()
    wait.until(lambda b: b.execute_script(visible, curves) == [True, True, True])

    log = [entry for entry in browser.get_log("browser") if entry["level"] in ("SEVERE", "WARNING")]
    assert not log, json.dumps(log, indent=1)


def test_table_of_rows_with_different_columns():
    rows = {"a": {"error": 0.12345, "tokens": 4096}, "b": {"error": 12345.6, "on": "a CPU"}}
    assert table(rows) == [
        "| | error | tokens | on |",
        "| --- | ---: | ---: | ---: |",
        "| a | 0.123 | 4,096 |  |",
        "| b | 12,346 |  | a CPU |",
        "",
    ]


def test_cells_are_kept_apart(tmp_path):
    """A file a cell, with where it was measured."""
    cells = Cells(tmp_path / "run")
    assert "softmax | 8" not in cells
    cells.keep("softmax | 8", {"loss": 0.5})
    found = Cells(tmp_path / "run")["softmax | 8"]
    assert found.pop("made")["torch"]
    assert found == {"loss": 0.5}
