"""Laws of the output folder: names never collide, and only a finished video looks finished."""
from __future__ import annotations

import contextlib
import errno
import fcntl
import io
import json
import logging
import multiprocessing
import os
import re
import struct
import termios
from functools import partial
from pathlib import Path

import pytest

from utils.files import remove_stale, temp_path, write_atomically
from utils.hashing import fingerprint, sha256_file, sha256_text
from utils.launch import Launch, read_launch
from utils.outputs import OutputFolder, append_json_line, check_writable, differences, read_json_lines, video_stem
from utils.progress import VideoProgress
from utils.prompts import PromptItem

WORDS = "A stylish woman walks down a Tokyo street filled with warm glowing neon and animated city signage."
RECORD = {"fingerprint": "f1", "prompt": "a cat", "seed": 1, "config": {"window_frames": 21}}


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))


def item(prompt: str, extended: str | None = None, source: Path | None = None) -> PromptItem:
    return PromptItem(7, prompt, extended, source)


def stem(of: PromptItem, *, sample: int = 0, seed: int = 0, with_index: bool = False) -> str:
    return video_stem(of, of.index, sample, seed, with_index=with_index)


# names ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "prompt", [WORDS, "con", "NUL", "../../etc/passwd", "a_b c/d\\e:f*?", "一只猫", "é" * 300, "-x-", "x" * 500, "..."]
)
def test_names_are_portable(prompt):
    """Lower-case letters, digits and single hyphens only, short, and never a reserved Windows name."""
    name = stem(item(prompt), seed=1356145, sample=3)
    assert re.fullmatch(r"[a-z0-9]+(-[a-z0-9]+)*", name) and len(name) <= 60 + 8 + 25
    reserved = {"con", "prn", "aux", "nul", *(f"{port}{i}" for port in ("com", "lpt") for i in range(10))}
    assert name not in reserved and stem(item(prompt), with_index=True) not in reserved


def test_names_are_readable_and_cut_between_words():
    """The slug is the beginning of the prompt, at most 60 characters of it, in whole words."""
    slug = stem(item(WORDS)).rsplit("-", 3)[0]
    assert len(slug) <= 60 and WORDS.lower().replace(" ", "-").startswith(slug + "-")
    assert stem(item("It's a café!")).startswith("its-a-cafe-")


def test_names_differ_whenever_the_video_does(tmp_path):
    """Prompt beyond the slug, extended text, source bytes, seed and sample each change the name; nothing else."""
    first, copy, second = tmp_path / "a.png", tmp_path / "b.png", tmp_path / "c.png"
    for path, content in ((first, b"1"), (copy, b"1"), (second, b"2")):
        path.write_bytes(content)
    base = item(WORDS)
    others = [item(WORDS + " x"), item(WORDS, "long"), item(WORDS, "longer"), item(WORDS, None, first)]
    names = [stem(i) for i in [base, *others, item(WORDS, None, second), item("1 " + WORDS)]]
    names += [stem(base, seed=1), stem(base, sample=1), stem(base, seed=11), stem(base, seed=1, sample=1)]
    assert len(set(names)) == len(names)
    assert stem(item(WORDS, None, first)) == stem(item(WORDS, None, copy))
    assert video_stem(base, 3, 0, 0, with_index=False) == video_stem(base, 99, 0, 0, with_index=False)


def test_names_with_index():
    """--save_with_index gives the padded line index and the sample, and sorts like the file up to 9999."""
    assert stem(item(WORDS), sample=2, seed=5, with_index=True) == "0007-2"
    assert video_stem(item(WORDS), 12345, 0, 5, with_index=True) == "12345-0"
    with pytest.raises(ValueError, match="index=-1"):
        video_stem(item(WORDS), -1, 0, 0, with_index=True)


# states -----------------------------------------------------------------------------------------


def make(folder: OutputFolder, name: str, content: bytes = b"video", **record) -> None:
    folder.start(name)
    write_atomically(folder.video_path(name), content)
    folder.finish(name, RECORD | record)


def test_life_of_a_video(tmp_path):
    """new -> finished; other settings are told apart; overwrite makes everything new."""
    folder = OutputFolder(tmp_path / "out" / "deep", overwrite=False)
    assert folder.state("v", "f1") == "new"
    make(folder, "v")
    assert folder.state("v", "f1") == "finished" and folder.state("v", "f2") == "other_settings"
    assert folder.state("v2", "f1") == "new"
    assert OutputFolder(folder.folder, overwrite=True).state("v", "f1") == "new"


LATER = {"later_prompts": [{"time": 2.5, "prompt": "b"}]}


@pytest.mark.parametrize("record, asked, told", [
    (LATER, {"later": ((2.5, "b"),), "seed": 2}, "seed 1 -> 2"),
    (LATER, {"seed": 1}, "later [[2.5, 'b']] -> None"),
    ({"later_prompts": []}, {"later": ((3.0, "c"),), "seed": 1}, "later None -> [[3.0, 'c']]"),
])
def test_a_change_is_told_alone(record: dict, asked: dict, told: str) -> None:
    """Later prompts stand in record and identity under two names; the same ones are no difference."""
    identity = {"text": "a", "source": None, **asked}
    assert differences({"prompt": "a", "seed": 1, **record}, identity) == told


@pytest.mark.parametrize("damage", ["no sidecar", "torn sidecar", "not complete", "shorter", "longer", "no video"])
def test_only_a_whole_pair_is_finished(tmp_path, damage):
    """A video without its word, with half of it, or of another size, is partial and will be redone."""
    folder = OutputFolder(tmp_path, overwrite=False)
    make(folder, "v")
    video, sidecar = folder.video_path("v"), folder.sidecar_path("v")
    if damage == "no sidecar":
        sidecar.unlink()
    elif damage == "torn sidecar":
        sidecar.write_bytes(sidecar.read_bytes()[:-20])
    elif damage == "not complete":
        sidecar.write_text(sidecar.read_text().replace("complete", "partial"))
    elif damage == "no video":
        video.unlink()
    else:
        video.write_bytes(b"vid" if damage == "shorter" else b"videovideo")
    assert folder.state("v", "f1") == "partial"
    make(folder, "v")
    assert folder.state("v", "f1") == "finished"


def test_redoing_a_finished_video_can_fail_without_loss(tmp_path):
    """start() and a failure leave the finished predecessor as it was."""
    folder = OutputFolder(tmp_path, overwrite=False)
    make(folder, "v")
    folder.start("v")
    folder.fail("v", {"error": "out of memory"})
    assert folder.state("v", "f1") == "finished"


def test_what_was_kept_stays_until_its_successor_is_there(tmp_path):
    """Starting again clears temporary files alone; finishing clears the kept part and its record, of this stem only."""
    folder = OutputFolder(tmp_path, overwrite=False)
    for stem in ("v", "w"):
        folder.partial_path(stem).write_bytes(b"half")
    folder.partial("v", RECORD)
    temp_path(folder.video_path("v")).write_bytes(b"x")
    folder.start("v")
    kept = {"manifest.jsonl", "v.partial.json", "v.partial.mp4", "w.partial.mp4"}
    assert {p.name for p in tmp_path.iterdir()} == kept and folder.state("v", "f1") == "partial"
    make(folder, "v")
    assert {p.name for p in tmp_path.iterdir()} == {"manifest.jsonl", "v.json", "v.mp4", "w.partial.mp4"}


def test_sidecar_is_readable_and_says_it_all(tmp_path):
    """Indented JSON in a stable order: status, file and size first, then the record as given; no bare nan."""
    folder = OutputFolder(tmp_path, overwrite=False)
    make(folder, "v", source=Path("a/b.png"), drift=float("nan"), steps=(1, 2))
    text = folder.sidecar_path("v").read_text()
    record = json.loads(text, parse_constant=lambda name: pytest.fail(f"bare {name}"))
    assert list(record)[:3] == ["status", "video", "bytes"] and list(record)[3:7] == list(RECORD)
    assert record["bytes"] == 5 and record["source"] == "a/b.png" and record["drift"] == "nan"
    assert '\n  "config": {\n    "window_frames": 21' in text
    with pytest.raises(TypeError, match=r"record\.config\.x is object"):
        folder.finish("v", RECORD | {"config": {"x": object()}})
    with pytest.raises(ValueError, match="fingerprint"):
        folder.finish("v", {"prompt": "a cat"})


def test_manifest_has_one_line_for_every_outcome(tmp_path):
    """finished, stopped and failed videos each add a line with their scalars, in order."""
    folder = OutputFolder(tmp_path, overwrite=False)
    make(folder, "v")
    folder.partial_path("w").write_bytes(b"half")
    folder.partial("w", RECORD)
    folder.fail("x", {"error": "disk full", "seed": 3})
    lines = read_json_lines(tmp_path / "manifest.jsonl")
    assert [(r["status"], r["video"]) for r in lines] == [
        ("complete", "v.mp4"), ("partial", "w.partial.mp4"), ("failed", "x.mp4"),
    ]
    assert lines[2]["error"] == "disk full" and "config" not in lines[0] and lines[0]["seed"] == 1


def test_unwritable_folder_is_told_at_once(tmp_path):
    """A file in the way, or a place where nothing can be made, is an OSError naming --output_folder."""
    (tmp_path / "file").write_text("")
    for folder in (tmp_path / "file", tmp_path / "file" / "sub", Path("/proc/no-such-place")):
        why = f": {tmp_path / 'file'} is a file. Choose another" if tmp_path in folder.parents else ""
        for check in (check_writable, partial(OutputFolder, overwrite=False)):
            with pytest.raises(OSError, match=f"--output_folder {folder} cannot be written to{why}"):
                check(folder)


def test_looking_whether_a_folder_can_be_written_leaves_nothing(tmp_path):
    """Neither the folder nor the file by which it was tried."""
    check_writable(tmp_path / "new" / "below")
    check_writable(tmp_path)
    assert not list(tmp_path.iterdir())


# manifest lines ---------------------------------------------------------------------------------


def _append_many(path: Path, rank: int) -> None:
    for i in range(100):
        append_json_line(path, {"rank": rank, "i": i, "text": "x" * (i * 97 % 9000)})


def test_lines_of_several_processes_never_mix(tmp_path):
    """Four processes append at once: every line of each is there, whole, and in its order."""
    path = tmp_path / "m.jsonl"
    context = multiprocessing.get_context("fork")
    children = [context.Process(target=_append_many, args=(path, rank)) for rank in range(4)]
    for child in children:
        child.start()
    for child in children:
        child.join()
    records = read_json_lines(path)
    assert len(records) == 400
    for rank in range(4):
        assert [r["i"] for r in records if r["rank"] == rank] == list(range(100))


def test_a_torn_last_line_costs_only_itself(tmp_path, caplog):
    """A line cut by a kill is skipped when reading, and the next line does not run into it."""
    path = tmp_path / "m.jsonl"
    assert read_json_lines(path) == []
    append_json_line(path, {"a": 1})
    with path.open("ab") as file:
        file.write('{"a": "é'.encode()[:-1])
    assert read_json_lines(path) == [{"a": 1}]
    append_json_line(path, {"a": 3})
    assert read_json_lines(path) == [{"a": 1}, {"a": 3}] and "line 2 is torn" in caplog.text


# files and hashes -------------------------------------------------------------------------------


def test_a_full_disk_is_told_with_the_file(tmp_path, monkeypatch):
    """The system does not say which file it was that found no room."""
    def no_room(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("utils.files.flush_to_disk", no_room)
    with pytest.raises(OSError, match=r"No space left on device: '.*/a.json'"):
        write_atomically(tmp_path / "a.json", b"new")
    assert not list(tmp_path.iterdir())


def test_atomic_write_keeps_the_old_file_on_failure(tmp_path, monkeypatch):
    """If the rename fails, the old content stands and no temporary file is left."""
    path = tmp_path / "a.json"
    write_atomically(path, b"old")
    monkeypatch.setattr("utils.files.os.replace", _refuse)
    with pytest.raises(OSError, match="refused"):
        write_atomically(path, b"new")
    assert path.read_bytes() == b"old" and list(tmp_path.iterdir()) == [path] and remove_stale(path) == 0


def _refuse(*_):
    raise OSError("refused")


def test_file_hash_is_remembered_but_never_stale(tmp_path, monkeypatch):
    """The second call does not read the file; a change of content is noticed; a lost memory costs only time."""
    path = tmp_path / "a.bin"
    path.write_bytes(b"one")
    assert sha256_file(path) == sha256_text("one")
    with monkeypatch.context() as patch:
        patch.setattr("utils.hashing.hashlib.file_digest", _refuse)
        assert sha256_file(path) == sha256_text("one")
    path.write_bytes(b"two!")
    assert sha256_file(path) == sha256_text("two!")
    monkeypatch.setenv("XDG_CACHE_HOME", "/proc/no-such-place")
    assert sha256_file(path) == sha256_text("two!")


def test_fingerprint_is_of_the_content():
    """Key order does not matter, every value does, and what JSON cannot hold is refused."""
    assert fingerprint({"a": 1, "b": [1, 2]}) == fingerprint({"b": [1, 2], "a": 1})
    assert len({fingerprint(v) for v in ({"a": 1}, {"a": 2}, {"a": "1"}, {"b": 1}, {"a": [1]})}) == 5
    with pytest.raises(TypeError):
        fingerprint({"a": Path("x")})
    with pytest.raises(ValueError, match="JSON"):
        fingerprint(float("nan"))


# launch -----------------------------------------------------------------------------------------


def test_launch_reads_torchrun():
    """Nothing set is one process; torchrun's three variables are taken as they are."""
    assert read_launch({}) == Launch(0, 1, 0) and read_launch({}).is_main
    assert read_launch({"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1"}) == Launch(5, 8, 1)


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ("1,2,", "not LOCAL_RANK"), ("a,2,0", "integers"), ("2,2,0", "RANK < WORLD_SIZE"),
        ("-1,2,0", "RANK=-1"), ("0,0,0", "WORLD_SIZE=0"), ("0,2,1", "LOCAL_RANK <= RANK"),
    ],
)
def test_broken_launch_is_refused(values, said):
    """Half-set, non-integer and out-of-range values are errors that show what was set."""
    pairs = zip(("RANK", "WORLD_SIZE", "LOCAL_RANK"), values.split(","), strict=True)
    with pytest.raises(ValueError, match=said):
        read_launch({name: value for name, value in pairs if value})


# progress ---------------------------------------------------------------------------------------


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def run_progress(stream, clock_s: float) -> None:
    now = [0.0]
    with VideoProgress("cat", num_chunks=20, fps=16, stream=stream, clock=lambda: now[0]) as progress:
        for chunk in range(20):
            now[0] += clock_s
            progress.update(9 if chunk == 0 else 12)
        assert progress.figures() == f"14.8 s of video, {237 / (20 * clock_s):.1f} FPS, 00:00 left"


def test_progress_in_a_log_is_sparse_and_right(caplog):
    """20 chunks of 3 s: one line at the start, one about every 10 s, one at the end, with the true figures."""
    with caplog.at_level(logging.INFO, logger="utils.progress"):
        run_progress(io.StringIO(), 3.0)
    lines = [record.message for record in caplog.records]
    assert lines[0] == "cat: start, 20 chunks"
    assert lines[-1] == "cat: done at chunk 20/20, 14.8 s of video in 60.0 s, 4.0 FPS"
    assert [line.split(",")[0] for line in lines[1:-1]] == [f"cat: chunk {i}/20" for i in (4, 8, 12, 16)]
    assert "2.8 s of video, 3.8 FPS, 00:48 left" in lines[1]


def test_progress_on_a_terminal_is_a_bar(caplog):
    """A terminal gets the bar with chunk, seconds, FPS and time left, and no log lines."""
    with caplog.at_level(logging.INFO, logger="utils.progress"):
        run_progress(screen := Terminal(), 3.0)
    assert "chunk 20/20, 14.8 s of video, 4.0 FPS, 00:00 left" in screen.getvalue() and not caplog.records


@pytest.mark.parametrize("columns, shown", [(0, 80), (80, 80), (40, 40)])
def test_the_figures_fit_any_terminal(columns, shown):
    """A long label never pushes the figures out; a terminal that reports 0 columns gets a bar as well."""
    outside, inside = os.openpty()
    fcntl.ioctl(inside, termios.TIOCSWINSZ, struct.pack("HHHH", columns and 24, columns, 0, 0))
    with os.fdopen(inside, "w") as terminal, VideoProgress(
        "x" * 90, num_chunks=2, fps=16, stream=terminal, clock=iter(range(99)).__next__,
    ) as progress:
        progress.update(9)
        progress.update(12)
    drawn = b""
    with contextlib.suppress(OSError):  # a terminal that nobody writes to any more has no end but this
        while part := os.read(outside, 1 << 16):
            drawn += part
    os.close(outside)
    lines = [line for line in drawn.decode().split("\r") if line.strip()]
    assert all(len(line) <= shown for line in lines)
    assert lines[-1].startswith("chunk 2/2, 1.3 s of video") and ("xxx..." in lines[-1]) == (shown > 40)
