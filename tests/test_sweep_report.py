"""What is made of a sweep's numbers: means, curves, tables, figures, recordings, and the page in a real browser."""
from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import tracemalloc
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from small_model import write_small_model, write_small_sweep

from evaluation.__main__ import main
from evaluation.metrics.table import Row, write_csv
from evaluation.sweep import figures
from evaluation.sweep.figures import draw_ablation, moments_of
from evaluation.sweep.numbers import Numbers
from evaluation.sweep.page import PAGE, by_second, write_page
from evaluation.sweep.record import read_recorded, record_units, records_path
from evaluation.sweep.recorded import by_age, draw_on_frames
from evaluation.sweep.results import load
from evaluation.sweep.settings import load_sweep
from evaluation.sweep.workers import prepare
from utils.config import REPOSITORY, ConfigError
from utils.video import VideoWriter, open_video, read_video

PAGE_PARTS = REPOSITORY / "evaluation" / "sweep"
HOSTS = re.compile(r"(?:src|href)=\"(?:[a-z]+:)?//|@import|url\(")


# --- a whole sweep --------------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def done(tmp_path_factory):
    """The folder of a small sweep of a random model, reported; its prompts hold what HTML must not take literally."""
    folder = tmp_path_factory.mktemp("report")
    prompts = folder / "prompts.txt"
    prompts.write_text("a </script><b>bold</b> & \"quoted\" circle\na plain square\n")
    column = {"metric": "brightness@whole", "label": "brightness", "better": "higher", "digits": 3}
    path = folder / "sweep.yaml"
    path.write_text(yaml.safe_dump({
        "seconds": [6], "model": str(write_small_model(folder)), "prompts": {"file": str(prompts)}, "batch_size": 2,
        "methods": {"sink_3": {"config": "configs/deep_sink.yaml", "set": ["kv_cache.sink_frames=3"]},
                    "rolling": {"config": "configs/self_forcing.yaml"},
                    "forcing": {"config": "configs/deep_forcing.yaml"}},
        "metrics": ["picture"], "record": {"methods": ["forcing", "rolling"], "seconds": 7},
        "tables": {"main": {"title": "Main <table>", "columns": [column], "quoted": "deep_forcing_stability"}},
        "ablations": {"sink": {"title": "Sink", "x": "sink_frames", "methods": ["sink_3", "rolling"],
                               "metrics": ["brightness@whole"]}},
    }))
    out = folder / "out"
    assert main(["sweep", str(path), "--output_folder", str(out), "--device", "cpu", "--random_weights"]) == 0
    assert main(["report", str(out), "--no_figures"]) == 0
    return out


class Reader(HTMLParser):
    """Tags that are open at the end, all that are referred to, and the text of scripts."""

    def __init__(self):
        super().__init__()
        self.open, self.files, self.scripts, self.tags = [], [], [], []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.files += [value for name, value in attrs if name in ("src", "href")]
        if tag not in ("meta", "input", "img", "link", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert tag == self.open.pop(), tag

    def handle_data(self, data):
        if self.open and self.open[-1] == "script":
            self.scripts.append(data)


def page_of(folder: Path) -> tuple[str, Reader]:
    text = (folder / PAGE).read_text()
    reader = Reader()
    reader.feed(text)
    return text, reader


def test_the_page_is_whole_and_needs_nothing_else(done):
    """Well-formed, no other host, its data is JSON, every video that it names is there, prompts are no markup."""
    text, reader = page_of(done)
    assert not reader.open and len(reader.scripts) == 2 and "b" not in reader.tags[:reader.tags.index("table")]
    assert not HOSTS.search(text) and "http" not in re.sub(r"http://www.w3.org/\S+", "", text)
    data = json.loads(reader.scripts[0])
    assert data["prompts"][0].startswith("a </script>") and data["metrics"]
    files = [video["file"] for mine in data["videos"].values() for video in mine.values()]
    assert len(files) == 6 and all((done / file).is_file() for file in files)
    assert all(len(curve["mean"]) == 6 for means in data["means"].values() for curve in means.values())
    assert "Main &lt;table&gt;" in text and 'class="quoted"' in text


def test_a_page_has_no_empty_heading(done, tmp_path):
    """Neither of tables nor of figures; the headings are those of parts that are there."""
    def headings(text: str) -> list[str]:
        return re.findall("<h2>(.*?)</h2>", text)

    assert headings(page_of(done)[0]) == ["Tables", "Settings"]
    folder = tmp_path / "copy"
    shutil.copytree(done, folder)
    saved = load(folder)
    assert headings(write_page(saved, Numbers(saved.rows), {}, {}).read_text()) == ["Settings"]


def test_curves_on_the_page_are_those_of_the_table(done):
    data, saved = json.loads(page_of(done)[1].scripts[0]), load(done)
    video = data["videos"]["rolling"]["1"]
    values = [r.value for r in saved.rows if f"videos/{r.video}" == video["file"] and r.metric == "brightness"
              and r.granularity == "second"]
    assert video["curves"]["brightness"]["mean"] == pytest.approx(values, rel=1e-4)


def test_a_place_in_a_curve_is_a_second():
    """A second that is missing keeps its place, at the start, in the middle, or because its value is unknown."""
    assert by_second([1.0, 4.0, 3.001], [0.123456, 2.0, float("nan")]) == [None, 0.12346, None, None, 2.0]


@pytest.fixture
def node() -> str:
    found = shutil.which("node")
    if found is None:
        pytest.skip("needs node")
    return found


def test_the_script_parses(node):
    assert subprocess.run([node, "--check", str(PAGE_PARTS / "page.js")], check=False).returncode == 0


def test_a_line_stops_where_a_second_is_missing(node):
    script = (PAGE_PARTS / "page.js").read_text()
    function = script[script.index("function stretches"):script.index("function plot")]
    call = "console.log(JSON.stringify([stretches([null, 5, 0, null, null, 7, 8, null, 9]), stretches([null])]))"
    said = subprocess.run([node, "-e", function + call], capture_output=True, text=True, check=True).stdout
    assert json.loads(said) == [[[1, 2], [5, 6], [8]], []]


def test_recordings_of_a_sweep(done):
    """What the files hold, and that a second run watches nothing again."""
    forcing, rolling = (read_recorded(records_path(done, name)) for name in ("forcing", "rolling"))
    assert rolling.chosen is None and forcing.chosen.shape[1] == 1
    torch.testing.assert_close(forcing.attention.sum(-1), torch.ones(forcing.attention.shape[:-1]))
    ages = by_age(rolling)
    assert (ages[..., :21] > 0).all() and ages.shape[-1] == rolling.attention.shape[-1]
    assert (ages[..., 21:] == 0).all()  # a window of 21 frames sees none that is older


def test_a_record_of_other_layers_is_none(done):
    """What was recorded is done for the layers that it holds, and for no others."""
    saved = load(done)
    sweep = load_sweep(done.parent / "sweep.yaml")
    tasks, _ = prepare(sweep, saved.folder, device="cpu", local_rank=0, random_weights=True, only=["rolling"])
    states = [record_units(done, tasks, replace(sweep.record, layers=layers))[0].is_done() for layers in ([], [0], [5])]
    assert states == [True, True, False]


def test_a_budget_without_top_c_is_reported(done, tmp_path):
    """Sinks and recent frames fill it, so nothing is ever chosen: its record says so, and has no figure of it."""
    pytest.importorskip("matplotlib")
    methods = {"none": {"config": "configs/deep_forcing.yaml", "set": ["kv_cache.budget_frames=14"]}}
    path, out = write_small_sweep(
        tmp_path, done.parent / "small.yaml", methods=methods, metrics=["picture"],
        record={"methods": ["none"], "seconds": 7}, prompts={"captions": [{"split": "test", "count": 1}]},
    ), tmp_path / "out"
    assert main(["sweep", str(path), "--output_folder", str(out), "--device", "cpu", "--random_weights"]) == 0
    assert read_recorded(records_path(out, "none")).chosen is None and main(["report", str(out)]) == 0
    assert [path.name for path in (out / "figures").glob("none_*")] == ["none_attention_over_earlier_frames.png"]


def test_moments_are_frames_of_the_file(done, monkeypatch):
    """Of one pass; past the end there is the last frame."""
    path = next((done / "videos" / "rolling").glob("*.mp4"))
    every, opened = torch.from_numpy(read_video(path)), []
    monkeypatch.setattr(figures, "open_video", lambda path: opened.append(path) or open_video(path))
    assert len(every) == 96 and torch.equal(moments_of(path, 6, 96), every[::19]) and opened == [path]
    assert [torch.equal(torch.from_numpy(frame), every[index]) for frame, index in
            zip(figures.frames_at(path, [9, 3, 200]), [9, 3, 95], strict=True)] == [True] * 3


def test_only_frames_that_are_shown_are_kept(done, tmp_path):
    """Sixteen hundred that come before them cost no memory."""
    pytest.importorskip("matplotlib")
    recorded = read_recorded(records_path(done, "forcing"))
    late = 400 * recorded.about["rows"] * recorded.about["columns"] + torch.arange(recorded.chosen.shape[-1])
    recorded = replace(recorded, chosen=late.expand_as(recorded.chosen))
    with VideoWriter(tmp_path / "long.mp4", fps=16) as writer:
        for _ in range(20):
            writer.write(np.zeros((80, 96, 160, 3), np.uint8))
    tracemalloc.start()
    draw_on_frames(recorded, tmp_path / "long.mp4", "title", tmp_path / "x.png")
    most = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert most < 1600 * 96 * 160 * 3 / 2


def test_figures_of_a_sweep(done):
    pytest.importorskip("matplotlib")
    assert main(["report", str(done)]) == 0
    names = {path.name for path in (done / "figures").glob("*.png")}
    assert {"ablation_sink.png", "second_brightness.png", "grid_00.png", "grid_01.png",
            "forcing_attention_over_earlier_frames.png", "forcing_selection_on_the_frames.png",
            "forcing_selection_frequency_over_positions.png", "rolling_attention_over_earlier_frames.png",
            "forcing_Jaccard_distance_of_consecutive_selections.png"} <= names
    assert all((done / file).is_file() for file in page_of(done)[1].files)


def test_a_report_without_matplotlib_says_what_to_do(done, tmp_path, monkeypatch, capsys):
    folder = tmp_path / "copy"
    shutil.copytree(done, folder)
    for name in ("matplotlib", "matplotlib.figure"):
        monkeypatch.setitem(sys.modules, name, None)
    assert main(["report", str(folder)]) == 2
    said = capsys.readouterr().err
    assert "pip install" in said and "--no_figures" in said
    assert main(["report", str(folder), "--no_figures"]) == 0


def test_an_ablation_needs_numbers_on_its_axis(done, tmp_path):
    saved = load(done)
    with pytest.raises(ConfigError, match=r"kv_cache.policy of rolling is 'rolling', no number"):
        draw_ablation(saved, Numbers(saved.rows), "policy", ["rolling"], [], tmp_path / "x.png")


def test_other_tools_numbers_join_ours(done, tmp_path):
    folder = tmp_path / "copy"
    shutil.copytree(done, folder)
    video = load(folder).videos[0]
    (folder / "imported").mkdir()
    write_csv([Row(video["video"], "rolling", "", "0", "imaging_quality", "clip2s", None, 0.7, "VBench-Long")],
              folder / "imported" / "vbench.csv")
    assert load(folder).rows[-1].value == 0.7 and len(load(folder).rows) == len(load(done).rows) + 1


def test_a_folder_without_a_sweep_is_refused(tmp_path, capsys):
    assert main(["report", str(tmp_path)]) == 2
    assert "no sweep was finished there" in capsys.readouterr().err


def in_the_way(path: Path) -> None:
    """A file where a folder should be."""
    shutil.rmtree(path, ignore_errors=True)
    path.touch()


@pytest.mark.parametrize("name, damage, said", [
    ("sweep.json", lambda path: path.write_text("[]"), "sweep.json or results.csv is damaged .* Run the same sweep"),
    ("sweep.json", lambda path: path.write_text(path.read_text().replace("shown", "show")), "the sweep's shown are"),
    ("sweep.json", lambda path: path.write_text(path.read_text().replace("digits", "d")), "tables.main.columns.digits"),
    ("results.csv", lambda path: path.unlink(), "has no results.csv: no sweep was finished there. Name a folder"),
    ("results.csv", lambda path: path.write_bytes(path.read_bytes()[:-30]), "results.csv is damaged"),
    ("records/forcing.safetensors", lambda path: path.write_bytes(path.read_bytes()[:99]), "forcing.safetensors is da"),
    ("tables", in_the_way, "report's folder .*tables cannot be written to: .*tables is a file. Choose another"),
    ("figures", in_the_way, "report's folder .*figures cannot be written to"),
])
def test_a_damaged_folder_is_one_line(done, tmp_path, capsys, name, damage, said):
    """What is wrong and what to do, in place of a traceback or of a report of half the numbers."""
    if name.startswith("records"):
        pytest.importorskip("matplotlib")
    folder = tmp_path / "copy"
    shutil.copytree(done, folder)
    damage(folder / name)
    assert main(["report", str(folder)]) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("error: ") and re.search(said, error) and "Errno" not in error


@contextmanager
def browsing(done: Path, folder: Path, change: Callable[[Path], None]):
    """The page of a changed copy, in Chromium; nothing in it fails, and no other host is asked."""
    playwright = pytest.importorskip("playwright.sync_api")
    chromium = shutil.which("chromium") or shutil.which("google-chrome")
    if chromium is None:
        pytest.skip("needs Chromium")
    shutil.copytree(done, folder)
    write_page(load(folder), Numbers(load(folder).rows), {}, {})
    change(folder)
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        page, problems = browser.new_page(), []
        page.on("pageerror", lambda error: problems.append(str(error)))
        page.on("request", lambda request: None if request.url.startswith("file:") else problems.append(request.url))
        page.goto((folder / PAGE).as_uri())
        yield page
        browser.close()
    assert not problems


@pytest.mark.parametrize("lost", [False, True])
def test_the_page_in_a_browser(done, tmp_path, lost):
    """Chromium, from the folder: players start, keep step, seek together and go; one whose file is lost says so."""
    def change(folder: Path) -> None:
        if lost:
            next((folder / "videos" / "forcing").glob("a-script*.mp4")).unlink()

    with browsing(done, tmp_path / "moved somewhere else", change) as page:
        page.wait_for_function(f"players.filter((p) => p.readyState >= 3).length === {2 if lost else 3}")
        assert page.locator(".missing").count() == int(lost)
        page.select_option("#rate", "0.5")   # so that a busy machine comes to the end before the video does
        page.click("#play")
        page.wait_for_function("now() > 0.7")
        times = page.evaluate("players.filter((p) => !p.error).map((p) => p.currentTime)")
        assert max(times) - min(times) < 0.25 and page.inner_text("#play") == "Pause"
        page.evaluate("players[1].currentTime = 4")   # one runs away and is called back
        page.wait_for_function("players.filter((p) => !p.error).every((p) => Math.abs(p.currentTime - now()) < 0.25)")
        page.click("#play")
        page.evaluate("seek(3)")
        page.wait_for_function("players.filter((p) => !p.error).every((p) => Math.abs(p.currentTime - 3) < 0.05)")
        page.wait_for_function("document.querySelector('line.now').getAttribute('x1') > 100")
        page.check("#every")
        assert page.locator("#curves svg").count() == page.locator("#metric option").count()
        page.uncheck("#methods input >> nth=0")
        assert page.locator("#players figure").count() == 2
        page.select_option("#prompt", "1")
        page.wait_for_function("players.length === 2 && players.every((p) => p.src.includes('a-plain-square'))")
        page.wait_for_function("players.every((p) => Math.abs(p.currentTime - 3) < 0.05)")  # the moment is kept


def test_a_longer_video_plays_on_beside_a_short_one(done, tmp_path):
    """One of two seconds waits at its end, and comes along when all go back; a chosen speed is kept."""
    def change(folder: Path) -> None:
        path = next((folder / "videos" / "sink_3").glob("a-plain*.mp4"))
        frames = read_video(path, max_frames=32)
        path.unlink()
        with VideoWriter(path, fps=16) as writer:
            writer.write(frames)

    with browsing(done, tmp_path / "copy", change) as page:
        page.select_option("#rate", "2")
        page.select_option("#prompt", "1")
        page.wait_for_function("players.length === 3 && players.every((p) => p.readyState >= 3)")
        assert page.evaluate("players.map((p) => p.playbackRate)") == [2, 2, 2]
        page.click("#play")
        page.wait_for_function("now() > 3")
        times = page.evaluate("Object.fromEntries(players.map((p) => [p.method, p.currentTime]))")
        assert times["sink_3"] == pytest.approx(2, abs=0.01) and min(times["rolling"], times["forcing"]) > 2.8
        page.select_option("#rate", "0.5")
        page.evaluate("seek(0)")
        page.wait_for_function("players.every((p) => !p.paused && p.currentTime > 0.3 && p.currentTime < 1.9)")
