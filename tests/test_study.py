"""Studies: rows of known videos, pairing, going on, refusals, reports, sheets."""
from __future__ import annotations

import json
import re
import sys

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from small_model import write_small_model

from evaluation.analysers import PROPERTIES
from evaluation.study import sources
from evaluation.study.__main__ import main
from evaluation.study.compare import compare
from evaluation.study.plots import draw_curves
from evaluation.study.readers import score
from evaluation.study.report import Group, flow_table, held, property_table, write_report
from evaluation.study.results import Results, Saved, load
from evaluation.study.scores import is_frozen, read, speed_ratio, summarise
from evaluation.study.settings import clips_of, load_study
from evaluation.study.sources import make_sources, psnr
from training.world import World, render, sample, to_frames
from utils.config import REPOSITORY, ConfigError

CPU = torch.device("cpu")
STUDIES = sorted((REPOSITORY / "evaluation" / "studies").glob("*.yaml"))


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """The YAML of a model to be run with random weights."""
    return write_small_model(tmp_path_factory.mktemp("small"))


@pytest.fixture
def write(tmp_path, small):
    """Write a study, its defaults changed by keywords, and return its path."""
    def to_file(**changed):
        study = {
            "seconds": 0.5, "model": str(small), "captions": [{"split": "test", "count": 2}], "batch_size": 2,
            "methods": {"rolling": {"config": "configs/self_forcing.yaml"}},
        }
        path = tmp_path / "study.yaml"
        path.write_text(yaml.safe_dump(study | changed))
        return path

    return to_file


def run(path, folder, *arguments):
    """The command line with random weights in this process; returns the exit status."""
    return main(["run", str(path), "--output_folder", str(folder), "--device", "cpu", "--workers", "0",
                 "--random_weights", *arguments])


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def without_name(rows):
    return [{key: value for key, value in row.items() if key != "method"} for row in rows]


# --- rows ---------------------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def shown():
    """Rendered clips of both held-out splits with their captions."""
    clips = [sample(seed, split) for split in ("test", "held_out") for seed in range(4)]
    frames = to_frames(render([clip.scene for clip in clips])).numpy()
    return list(zip(frames, clips, strict=True))


def test_the_truth_scores_full_marks(shown):
    found = score(shown)
    assert found["videos"] == 8
    for name in PROPERTIES:
        assert found["holds"][name] == 1, name
        assert found["rate"][name] > 0.95, name
    assert found["duplicates"] < 0.05 and found["survival"] > 0.99


def test_other_processes_score_alike(shown):
    assert score(shown[:2], workers=1) == score(shown[:2])


def test_what_is_unsaid_is_not_judged():
    """A caption without a motion or a pattern: None, not wrong, whatever the video shows."""
    clip = next(c for c in (sample(seed, "test") for seed in range(99)) if c.said.motion is None is c.said.pattern)
    row = read(to_frames(render([clip.scene], num_frames=33))[0].numpy(), clip)
    assert row["video"]["holds"]["motion"] is None and row["windows"]["last"]["pattern"] is None
    assert row["video"]["holds"]["colour"] is True
    assert summarise([row])["holds"]["motion"] is None
    assert json.loads(json.dumps(row, allow_nan=False)) == row


def test_windows_are_means_of_curves(shown):
    """Two roads to the first five seconds: the window, and the five whole seconds that it is made of."""
    row = read(*shown[0])
    for name in ("speed", "colour", "sharpness"):
        assert row["windows"]["first"][name] == pytest.approx(np.mean(row["curves"][name]), rel=0.02)
    assert len(row["curves"]["speed"]) == 5 and row["pixel_frames"] == 81


def test_psnr_by_hand():
    assert psnr(255 ** 2) == 0
    assert psnr(6.5025) == pytest.approx(40)
    assert psnr(0) == 60


# --- runs ---------------------------------------------------------------------------------------------------

def test_noise_is_paired(write, tmp_path):
    """One method under two names gives identical rows; another caption or another seed does not."""
    twice = {name: {"config": "configs/self_forcing.yaml"} for name in ("first", "second")}
    assert run(write(methods=twice), tmp_path / "a") == 0
    rows = {name: without_name(lines(tmp_path / "a" / f"{name}.jsonl")) for name in twice}
    assert rows["first"] == rows["second"] and len(rows["first"]) == 2
    assert rows["first"][0]["windows"] != rows["first"][1]["windows"]
    assert run(write(methods=twice, seed=1), tmp_path / "b", "--methods", "first", "--count", "1") == 0
    assert lines(tmp_path / "b" / "first.jsonl")[0]["windows"] != rows["first"][0]["windows"]


def test_a_caption_has_its_own_noise_in_any_batch(write):
    """Alone or beside others, up to what rounding does to a random network; beside another caption nothing agrees."""
    study = load_study(write())
    rollout = make_sources(study, device=CPU, random_weights=True)["rolling"]
    clips = clips_of(study, World())
    together, alone = next(rollout.videos([clips])).frames, next(rollout.videos([clips[1:]])).frames
    assert np.abs(together[1].astype(int) - alone[0]).mean() < 0.01
    assert np.abs(together[0].astype(int) - alone[0]).mean() > 10


def test_a_run_goes_on_where_it_stopped(write, tmp_path, monkeypatch):
    """Only what is missing is made: more captions later, and nothing once all are there."""
    asked, videos = [], sources.Rendered.videos

    def watched(self, batches):
        asked.extend(clip.seed for batch in batches for clip in batch)
        return videos(self, batches)

    monkeypatch.setattr(sources.Rendered, "videos", watched)
    path = write(methods={}, references=["rendered"], captions=[{"split": "test", "count": 3}])
    for count, expected in (("1", [0]), ("3", [0, 1, 2]), ("3", [0, 1, 2])):
        assert run(path, tmp_path / "out", "--count", count) == 0
        assert asked == expected
    assert [row["seed"] for row in lines(tmp_path / "out" / "rendered.jsonl")] == [0, 1, 2]
    record = json.loads((tmp_path / "out" / "study.json").read_text())
    assert [run["seconds"]["rendered"]["videos"] for run in record["runs"]] == [1, 2]


def test_the_record_says_how_rows_were_made(write, tmp_path):
    assert run(write(references=["reconstructed"]), tmp_path / "out", "--count", "1") == 0
    record = json.loads((tmp_path / "out" / "study.json").read_text())
    made = record["methods"]["rolling"]
    assert made["weights"]["transformer"] == "random" and made["config"]["kv_cache"]["policy"] == "rolling"
    assert made["pixel_frames"] == 9 and record["study"]["captions"] == [{"split": "test", "count": 2, "first": 0}]
    built, recorded = torch.__version__, record["runs"][0]["versions"]["torch"]  # "+cu130" is in the first alone
    assert recorded.partition("+")[0] == built.partition("+")[0]
    row = lines(tmp_path / "out" / "reconstructed.jsonl")[0]
    assert 0 < row["psnr"] < 60 and 0 < row["psnr_last_frame"] < 60


@pytest.mark.parametrize("changed, said", [
    ({"methods": {"rolling": {"config": "configs/self_forcing.yaml", "set": ["kv_cache.window_frames=9"]}}},
     "rolling was made with config.kv_cache.window_frames=21, and it is 9 now"),
    ({"seconds": 1}, "rolling was made with pixel_frames=9, and it is 17 now"),
    ({"methods": {"other": {"config": "configs/self_forcing.yaml"}}, "seed": 4}, "seed would be 0 and 4 in one folder"),
])
def test_another_study_is_refused(write, tmp_path, capsys, changed, said):
    """A folder keeps to one study: other settings, another length or other noise need another folder."""
    assert run(write(), tmp_path / "out", "--count", "1") == 0
    before = (tmp_path / "out" / "rolling.jsonl").read_bytes()
    assert run(write(**changed), tmp_path / "out") == 2
    error = capsys.readouterr().err
    assert said in error and "Choose another --output_folder" in error
    assert (tmp_path / "out" / "rolling.jsonl").read_bytes() == before


@pytest.mark.parametrize("changed, said", [
    ({"methods": {"a": {"config": "configs/self_forcin.yaml"}}}, r"method a: .*no such file\. Did you mean"),
    ({"methods": {"a": {"config": "configs/deep_sink.yaml", "set": ["kv_cache.sink_frames=30"]}}}, "method a: .*sink"),
    ({"methods": {"a": {"config": "configs/deep_sink.yaml", "set": ["kv_cache.sinks=3"]}}}, "method a: .*sinks"),
    ({"methods": {"a": {"config": "configs/full.yaml"}}, "seconds": 60}, "method a: .*latent frames.*policy"),
    ({"methods": {"a": {"file": "configs/full.yaml"}}}, r"unknown key methods\.a\.file\. Valid keys: config, set"),
    ({"methods": {"rendered": {"config": "configs/full.yaml"}}}, "methods: 'rendered' cannot be a method's name"),
    ({"methods": {"../a": {"config": "configs/full.yaml"}}}, "cannot be a method's name. Use lower-case"),
    ({"methods": {}}, "neither methods nor references.*Add a method"),
    ({"captions": [{"split": "test"}]}, r"study.yaml:\d+: lacks captions\[0\]\.count\. Add it"),
    ({"batchsize": 4}, r"unknown key batchsize\. Did you mean batch_size\? Valid keys: seconds, .*study.settings"),
    ({"captions": [{"split": "test", "cont": 1}]}, r"unknown key captions\[0\]\.cont\. Did you mean count\? Valid"),
    ({"batch_size": 0}, "batch_size=0 is too small. Ask for 1 or more"),
    ({"seconds": 0}, "seconds=0.0 is no length.*Ask for more than 0"),
    ({"methods": 3}, r"yaml:\d+: methods=3 is not allowed\. Allowed: .*, each with .* the keys config, set"),
    ({"captions": []}, "captions is empty.*Name a split and a count"),
    ({"captions": [{"split": "test", "count": 0}]}, "count=0 from first=0 names no caption. Ask for at least one"),
    ({"captions": [{"split": "test", "count": 10**6}]}, "count=1000000 is more than 100,000 captions"),
    ({"captions": [{"split": "tests", "count": 1}]}, "split='tests' is unknown. Use one of: train, test"),
    ({"captions": [{"split": "test", "count": 3}, {"split": "test", "first": 2, "count": 1}]}, "two sets share"),
    ({"against": ["deep_sink"]}, "against: 'deep_sink' is none of the study's methods. Known: rolling"),
    ({"chains": [["rolling", "x"]]}, "chains: 'x' is none"),
    ({"references": ["truth"]}, "references: 'truth' is unknown. Use: rendered"),
    ({"sheet_captions": 1}, "sheet_captions=1 without sheet_seconds. Name the moments"),
    ({"sheet_seconds": [9]}, "sheet_seconds names 9 s, outside of 0..0.5 s"),
])
def test_a_bad_study_is_refused(write, tmp_path, capsys, changed, said):
    """What, got, why, what to do; before anything is computed."""
    assert run(write(**changed), tmp_path / "out") == 2
    error = capsys.readouterr().err
    assert re.search(said, error), error
    assert not (tmp_path / "out").exists()


def test_bad_flags_are_refused(write, tmp_path, capsys):
    assert run(write(), tmp_path / "out", "--methods", "x") == 2
    assert run(write(), tmp_path / "out", "--count", "0") == 2
    assert main(["report", str(tmp_path / "nowhere")]) == 2
    (tmp_path / "file").write_text("mine")
    assert run(write(), tmp_path / "file") == 2 and (tmp_path / "file").read_text() == "mine"
    error = capsys.readouterr().err
    assert "file is a file. Choose another" in error
    assert "--methods x: not in" in error and "--count 0 is too small" in error and "no study was made in" in error


@pytest.mark.parametrize("path", STUDIES, ids=lambda path: path.stem)
def test_the_studies_here_can_run(path):
    """Every method's config resolves, and every caption can be drawn."""
    study = load_study(path)
    made = make_sources(study, device=CPU, random_weights=True)
    assert list(made) == study.names
    settings = [json.dumps(source.settings(), sort_keys=True) for source in made.values()]
    assert len(set(settings)) == len(settings)
    assert len(clips_of(study, World(), count=3)) == 3 * len(study.captions)


# --- reports ------------------------------------------------------------------------------------------------

def row(seed, drift, *, first=40.0, last=40.0, colour=True, motion="drift"):
    """A row with made-up numbers."""
    rate = dict.fromkeys(PROPERTIES, 1.0) | {"colour": 1.0 if colour else 0.4}
    window = {"speed": first, "edge_speed": 3.0, **rate}
    return {
        "split": "test", "seed": seed, "caption": f"caption {seed}", "said": {"motion": motion},
        "video": {
            "rate": rate, "holds": {name: value >= 0.8 for name, value in rate.items()}, "background_drift": drift,
            "colour_error": 0.01, "duplicates": 0.0, "jumps": 0, "rollbacks": 0, "flicker": 0.0, "sharpness_ratio": 1.0,
            "survival": 1.0,
        },
        "windows": {"first": window, "last": window | {"speed": last}},
        "curves": {name: [0.0] * 60 for name in ("background_drift", "colour", "shape", "speed", "edge_speed")},
    }


@pytest.fixture
def saved(tmp_path):
    """Sixteen captions: the second method drifts half as much as the first, the third not at all, since it stands."""
    rows = {
        "rolling": [row(i, 0.1 + 0.01 * i, colour=i >= 4) for i in range(16)],
        "deep_sink": [row(i, 0.05 + 0.005 * i) for i in range(16)],
        "still": [row(i, 0.0001, last=20.0) for i in range(16)],
    }
    study = {
        "seconds": 60.0, "model": "tiny", "seed": 0, "captions": [{"split": "test", "count": 16, "first": 0}],
        "references": [], "methods": {name: {} for name in rows}, "against": ["deep_sink", "rolling"],
        "chains": [["rolling", "deep_sink"]], "sheet_seconds": [1.0, 2.0],
    }
    return Saved(tmp_path, study, rows)


def test_comparison_by_hand(saved):
    found = compare(saved.rows["deep_sink"], saved.rows["rolling"])
    assert (found.videos, found.lower, found.higher, found.p) == (16, 16, 0, 2 / 2 ** 16)
    assert (found.ratio.value, found.ratio.low, found.ratio.high) == pytest.approx((0.5, 0.5, 0.5))
    assert found.verdict == "drifts less"
    assert compare(saved.rows["rolling"], saved.rows["deep_sink"]).verdict == "drifts more"
    assert compare(saved.rows["rolling"], saved.rows["rolling"]).p == 1                  # all ties
    assert compare(saved.rows["rolling"][:4], saved.rows["rolling"][8:]) is None         # no caption in common


def test_a_frozen_method_is_marked_and_does_not_count(saved):
    assert is_frozen(saved.rows["still"]) and not is_frozen(saved.rows["deep_sink"])
    assert compare(saved.rows["still"], saved.rows["rolling"]).verdict == "frozen: does not count"
    assert compare(saved.rows["rolling"], saved.rows["still"]).verdict == "the other is frozen: does not count"
    text = write_report(saved)
    line = next(line for line in text.splitlines() if line.startswith("| still | 16 | 0.0001"))
    assert "0.0001 [0.0001, 0.0001] (frozen)" in line and "0.500 (frozen)" in line and "100.0 [81, 100]" in line
    assert "(frozen)" not in next(line for line in text.splitlines() if line.startswith("| deep_sink | 16 | 0.08"))


def test_only_captions_that_both_have_are_compared(saved):
    rolling, fast = saved.rows["rolling"], saved.rows["deep_sink"]
    still = [row(i, 1.0, last=0.0) for i in range(16, 60)]
    assert compare(fast + still, rolling) == compare(fast, rolling)
    assert compare(rolling, fast + still) == compare(rolling, fast)


def test_speed_is_read_where_the_motion_shows():
    """A spinning shape's centre rests, and an unsaid motion may be a spin: their outlines count."""
    assert speed_ratio([row(0, 0.0, last=10.0)]) == 0.25
    assert speed_ratio([row(0, 0.0, last=10.0, motion="spin")]) == 1
    assert speed_ratio([row(0, 0.0, last=10.0, motion=None)]) == 1
    assert speed_ratio([row(0, 0.0, last=None), row(1, 0.0)]) == 0.5                     # one lost its shapes


def test_videos_of_nothing_are_frozen():
    """Empty pictures do not drift; that must not count."""
    empty = [row(0, 0.0, first=None, last=None)]
    assert np.isnan(speed_ratio(empty)) and is_frozen(empty)
    assert "100.0 [" in flow_table([Group("empty", empty)], long=True)  # by the report's column of frozen videos, too


def test_report_holds_the_shares(saved):
    """Twelve of sixteen: 75 %, Wilson 51 to 90 %."""
    text = write_report(saved)
    assert "| rolling | 16 | 75.0 [51, 90] | 100.0 [81, 100] |" in text
    assert "| deep_sink against rolling | 16 | 0.500 [0.500, 0.500] | 16 of 16 | 3.1e-05 | drifts less |" in text
    assert "## Drift against deep_sink" in text and "## Drift against rolling" in text
    assert text.splitlines().count("| method | videos | ratio of mean drift | drifts less on | p | verdict |") == 3
    assert property_table([], held).count("\n") == 1


def test_short_studies_report_splits_and_no_drift(write, tmp_path, capsys):
    captions = [{"split": "test", "count": 1}, {"split": "held_out", "count": 1}]
    path = write(methods={}, references=["rendered", "reconstructed"], captions=captions)
    assert run(path, tmp_path / "out") == 0
    assert main(["report", str(tmp_path / "out"), "--no_curves"]) == 0
    text = capsys.readouterr().out
    assert (tmp_path / "out" / "report.md").read_text() in text
    assert "| rendered, test | 1 |" in text and "| reconstructed, held_out | 1 |" in text
    assert "PSNR" in text and "drift" not in text


def test_curves_without_matplotlib_say_what_to_do(saved, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ConfigError, match=r"need matplotlib.*pip install -e '.\[evaluation\]'"):
        draw_curves(saved, saved.folder / "curves.png")


def test_a_folder_reads_back_what_was_added(tmp_path):
    """Captions in the study's order, each once, also after a torn line."""
    study = {"captions": [{"split": "test"}], "references": [], "methods": {"a": {}}}
    results = Results(tmp_path, study, {"a": {"pixel_frames": 9, "seed": 0}})
    results.append("a", [row(2, 0.2), row(0, 0.1)])
    with (tmp_path / "a.jsonl").open("a") as file:
        file.write('{"method": "a", "split": "te')
    Results(tmp_path, study, {"a": {"pixel_frames": 9, "seed": 0}}).append("a", [row(1, 0.3), row(2, 0.4)])
    assert results.done("a") == {("test", 0), ("test", 1), ("test", 2)}
    assert [row["video"]["background_drift"] for row in load(tmp_path).rows["a"]] == [0.1, 0.3, 0.4]


# --- sheets -------------------------------------------------------------------------------------------------

def test_sheet_shows_the_moments(write, tmp_path):
    """Per kept caption one row a method: the truth's frames at their times, pixel for pixel."""
    path = write(references=["rendered"], sheet_captions=1, sheet_seconds=[0, 0.25, 0.5])
    assert run(path, tmp_path / "out") == 0
    assert main(["sheet", str(tmp_path / "out")]) == 0
    sheet = np.asarray(Image.open(tmp_path / "out" / "sheet.png"))
    assert sheet.shape == (2 * (96 + 12), 3 * 160, 3)
    true = to_frames(render([sample(0, "test").scene], num_frames=9))[0].numpy()
    np.testing.assert_array_equal(sheet[12:108], np.concatenate(true[[0, 4, 8]], axis=1))
    assert main(["sheet", str(tmp_path / "out"), "--methods", "x"]) == 2


@pytest.mark.parametrize("lose", [
    lambda strip: strip.unlink(),
    lambda strip: strip.write_bytes(strip.read_bytes()[:-40]),
    lambda strip: strip.write_bytes(b"no picture"),
    lambda strip: Image.open(strip).crop((0, 0, 160 * 2 - 1, 96)).save(strip),   # fewer moments than are asked for
], ids=["missing", "torn", "no picture", "cut"])
def test_a_sheet_names_what_it_lacks(write, tmp_path, caplog, lose):
    """What is there is drawn; lost moments, and a method that was not run, are one line and exit status 1."""
    caplog.set_level("INFO")
    methods = {name: {"config": "configs/self_forcing.yaml"} for name in ("rolling", "unmade")}
    path = write(methods=methods, references=["rendered"], sheet_captions=2, sheet_seconds=[0, 0.5])
    assert run(path, tmp_path / "out", "--methods", "rolling", "rendered") == 0
    assert main(["sheet", str(tmp_path / "out"), "--methods", "rolling", "rendered"]) == 0
    lose(tmp_path / "out" / "frames" / "rolling" / "test-1.png")
    assert main(["sheet", str(tmp_path / "out")]) == 1
    assert caplog.messages[-1] == "without kept frames, not run or lost: rolling (test-1); unmade (test-0, test-1)"
    assert np.asarray(Image.open(tmp_path / "out" / "sheet.png")).shape == (3 * (96 + 12), 2 * 160, 3)


def test_a_sheet_of_a_part_lacks_nothing(write, tmp_path):
    """Captions that no method has met yet are not missed."""
    path = write(methods={}, references=["rendered"], sheet_captions=2, sheet_seconds=[0, 0.5])
    assert run(path, tmp_path / "out", "--count", "1") == 0 and main(["sheet", str(tmp_path / "out")]) == 0
    assert run(path, tmp_path / "out") == 0 and main(["sheet", str(tmp_path / "out")]) == 0
    assert np.asarray(Image.open(tmp_path / "out" / "sheet.png")).shape == (2 * (96 + 12), 2 * 160, 3)


def test_no_sheet_without_kept_frames(write, tmp_path, capsys):
    assert run(write(methods={}, references=["rendered"]), tmp_path / "out") == 0
    assert main(["sheet", str(tmp_path / "out")]) == 2
    assert "holds no kept frames. Ask for them with sheet_captions" in capsys.readouterr().err
