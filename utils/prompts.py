"""Prompts: from one --prompt, a .txt or .jsonl file, or a folder, to a list of items.

    .txt     one prompt a line; blank lines are skipped but counted
    .jsonl   one object a line: {"prompt": ..., optional "extended", and "image" or "video"};
             file names are relative to the .jsonl
    .jsonl, .yaml   prompts that follow each other in one video: see utils/timelines.py
    folder   its .txt files in sorted order; with i2v, images or videos with a .txt of the same name

Lines are numbered before anything is dropped, so an index always means the same line of the file, and
`extended_prompt_path` is lined up with it line by line.
"""
from __future__ import annotations

import codecs
import difflib
import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from utils.hashing import sha256_file
from utils.timelines import Later, TimelineError, is_entry, read_timeline
from utils.yaml_files import read_plain_yaml

logger = logging.getLogger(__name__)

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
VIDEO_SUFFIXES = (".mp4", ".mov", ".mkv", ".webm", ".avi", ".gif")
TABLE_SUFFIXES = (".json", ".csv", ".tsv")  # text, but a line is no prompt
PROBE_BYTES = 1 << 16
T = TypeVar("T")


class PromptError(ValueError):
    """The prompts cannot be read as asked; the message names the file, the line and the remedy."""


@dataclass(frozen=True)
class PromptItem:
    """One video to make.

    index: 0-based line of the prompt file (blank lines count). prompt: as the user wrote it. extended: its
    longer version, if any. source: image or video to continue, if any. later: prompts that follow in the same
    video, each with the second at which it begins.
    """

    index: int
    prompt: str
    extended: str | None
    source: Path | None
    later: Later = ()

    @property
    def text(self) -> str:
        """What the text encoder gets: the extended prompt if there is one."""
        return self.extended or self.prompt

    @property
    def texts(self) -> tuple[str, ...]:
        """Every text of the video, in order."""
        return self.text, *(prompt for _, prompt in self.later)


@dataclass(frozen=True)
class _Line:
    """One line of a prompt file; `prompt` is empty for a blank line. `where` is for messages."""

    where: str
    prompt: str
    extended: str | None = None
    source: Path | None = None
    later: Later = ()


def load_prompts(
    *, prompt: str | None, data_path: Path | None, extended_prompt_path: Path | None, i2v: bool
) -> list[PromptItem]:
    """Read every prompt the user asked for.

    Args: prompt, or data_path (.txt, .jsonl, folder), not both, except that with i2v a single prompt
        takes its image or video from data_path; extended_prompt_path, longer versions line by line.
    Returns: items in order; exact repeats (prompt, extended, bytes of the source) are left out and logged.
    Raises: PromptError for anything missing, empty, binary, misaligned, or without an image under i2v.
    """
    data_path = None if data_path is None else Path(data_path)
    if prompt is not None:
        lines = [_single(prompt, data_path, i2v)]
    elif data_path is not None:
        lines = _read_lines_of(data_path, i2v)
    else:
        raise PromptError("no prompt given. Use --prompt 'text' or --data_path FILE (.txt, .jsonl or a folder)")
    if extended_prompt_path is not None:
        lines = _with_extended(lines, data_path or "--prompt", Path(extended_prompt_path))
    for line in lines:
        _check_encodable(line)
    items = [
        PromptItem(i, line.prompt, line.extended, line.source, line.later)
        for i, line in enumerate(lines) if line.prompt
    ]
    if not items:
        raise PromptError(f"{data_path or '--prompt'}: holds no prompt. Write at least one line of text")
    _check_sources(items, lines, i2v)
    return _without_repeats(items, lines)


def shard(items: Sequence[T], rank: int, world_size: int) -> list[T]:
    """The items of one process: every world_size-th from `rank` on. All ranks together hold each item once."""
    if not 0 <= rank < world_size:
        raise ValueError(f"rank={rank} is not one of {world_size} processes. Give 0 <= rank < world_size")
    return list(items[rank::world_size])


def read_text_lines(path: Path) -> list[str]:
    """Lines of a UTF-8 text file, stripped; blank ones stay as "", those at the end go.

    Understands a byte-order mark and the line ends of every system.
    Raises: PromptError for a missing, binary, empty or non-UTF-8 file (with the line number).
    """
    text = _decode(path, _read_bytes(path))
    text = text.replace("\r\n", "\n").replace("\r", "\n")  # str.splitlines would also split at form feeds and the like
    lines = [line.strip() for line in text.split("\n")]
    while lines and not lines[-1]:
        lines.pop()
    if not lines:
        raise PromptError(f"{path}: the file is empty. Write one prompt a line")
    return lines


def _read_bytes(path: Path) -> bytes:
    if path.exists() and not path.is_file():
        raise PromptError(f"{path}: is no plain file. Write what comes from there into a .txt, one prompt a line")
    if not path.is_file():
        raise PromptError(_missing(path))
    try:
        with path.open("rb") as file:
            head = file.read(PROBE_BYTES)  # a checkpoint given by mistake must not be read whole
            if head.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
                raise PromptError(f"{path}: is UTF-16 text, and UTF-8 is wanted. Save it as UTF-8")
            if b"\0" in head:
                raise PromptError(f"{path}: is a binary file, not text. Give a .txt with one prompt a line")
            return head + file.read()
    except OSError as error:
        raise PromptError(f"{path}: cannot be read: {error.strerror}. Check its permissions") from error


def _decode(path: Path, data: bytes) -> str:
    data = data.removeprefix(codecs.BOM_UTF8)
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise PromptError(
            f"{path}: line {line} is not UTF-8 (byte 0x{data[error.start]:02x}). Save the file as UTF-8, or if it is "
            "no text at all, give a .txt with one prompt a line"
        ) from error


def _missing(path: Path) -> str:
    """Message for a path that is not there, with the nearest names that are."""
    message = f"{path}: no such file."
    folder = path.parent
    while not folder.is_dir():
        folder = folder.parent
    names = [p.name + ("/" if p.is_dir() else "") for p in folder.iterdir() if not p.name.startswith(".")]
    wanted = path.relative_to(folder).parts[0]
    if folder != path.parent:
        message = f"{path}: no such file; the folder {folder / wanted} does not exist."
    near = difflib.get_close_matches(wanted, names, n=3, cutoff=0.5)
    if near:
        message += f" Nearest in {folder}: {', '.join(near)}."
    if "MovieGenVideoBench" in path.name:
        message += " Fetch it with `python -m utils.download --prompts`"
    else:
        message += " Check --data_path and --extended_prompt_path"
    return message


def _single(prompt: str, data_path: Path | None, i2v: bool) -> _Line:
    text = " ".join(prompt.split())
    if not text:
        raise PromptError("--prompt is empty. Describe the video in a few words, or better in a paragraph")
    if data_path is not None and not (i2v and data_path.suffix.lower() in IMAGE_SUFFIXES + VIDEO_SUFFIXES):
        raise PromptError(
            f"--prompt and --data_path {data_path} were both given. Give one; only with --i2v may --data_path name "
            "the image or video that the single prompt continues"
        )
    return _Line("--prompt", text, source=data_path)


def _read_lines_of(path: Path, i2v: bool) -> list[_Line]:
    if path.is_dir():
        return _read_pairs(path) if i2v else _read_folder(path)
    if path.suffix.lower() == ".jsonl":
        return _read_json_lines(path)
    if path.suffix.lower() in (".yaml", ".yml"):
        return _read_yaml(path)
    if path.suffix.lower() in IMAGE_SUFFIXES + VIDEO_SUFFIXES and path.is_file():
        raise PromptError(f"{path}: is an image or video, not prompts. Add --i2v and --prompt 'text' to continue it")
    if path.suffix.lower() in TABLE_SUFFIXES:
        raise PromptError(f"{path}: {path.suffix} is not read. Give a .txt with one prompt a line, a .jsonl or a .yaml")
    return _text_lines(path)


def _text_lines(path: Path) -> list[_Line]:
    return [
        _Line(f"{path}: line {number}", " ".join(line.split())) for number, line in enumerate(read_text_lines(path), 1)
    ]


def _read_folder(folder: Path) -> list[_Line]:
    files = sorted(p for p in folder.iterdir() if p.suffix.lower() == ".txt" and p.is_file())
    if not files:
        raise PromptError(f"{folder}: holds no .txt file. Put prompts in .txt files, one a line")
    return [line for file in files for line in _text_lines(file)]


def _read_pairs(folder: Path) -> list[_Line]:
    """Image-to-video folder: every image or video with the one prompt of the .txt that shares its name."""
    files = [p for p in sorted(folder.iterdir()) if p.is_file() and not p.name.startswith(".")]
    sources = [p for p in files if p.suffix.lower() in IMAGE_SUFFIXES + VIDEO_SUFFIXES]
    texts = {p.stem: p for p in files if p.suffix.lower() == ".txt"}
    if not sources:
        raise PromptError(f"{folder}: --i2v, but no image or video is there. Put cat.png beside cat.txt, and so on")
    lines, seen = [], {}
    for source in sources:
        if source.stem in seen:
            raise PromptError(f"{folder}: {seen[source.stem]} and {source.name} share a name. Keep one, or rename one")
        seen[source.stem] = source.name
        if source.stem not in texts:
            raise PromptError(f"{source}: has no prompt. Write one into {source.stem}.txt beside it")
        prompts = [line.prompt for line in _text_lines(texts[source.stem]) if line.prompt]
        if len(prompts) != 1:
            raise PromptError(f"{texts[source.stem]}: {len(prompts)} prompts for one {source.name}. Keep one line")
        lines.append(_Line(str(source), prompts[0], source=source))
    alone = sorted(set(texts) - set(seen))
    if alone:
        raise PromptError(f"{folder / alone[0]}.txt: no image or video has this name. Add it, or remove the text")
    return lines


def _read_json_lines(path: Path) -> list[_Line]:
    """One video a line; or one video in all, if the lines are the moments of a timeline."""
    lines = read_text_lines(path)
    records = {number: _json_record(path, number, line) for number, line in enumerate(lines, 1) if line}
    if is_entry(next(iter(records.values()))):
        return [_timeline(list(records.values()), str(path))]
    blank = (_Line(f"{path}: line {number}", "") for number in range(1, len(lines) + 1))
    return [
        _json_line(path, number, records[number]) if number in records else line
        for number, line in enumerate(blank, 1)
    ]


def _read_yaml(path: Path) -> list[_Line]:
    _read_bytes(path)  # a file that is no text is said to be none
    videos = read_plain_yaml(path)
    if isinstance(videos, list) and videos and all(isinstance(video, list) for video in videos):
        return [_timeline(video, f"{path}: video {number}") for number, video in enumerate(videos, 1)]
    return [_timeline(videos, str(path))]


def _timeline(entries: object, where: str) -> _Line:
    try:
        prompt, later = read_timeline(entries, where)
    except TimelineError as error:
        raise PromptError(str(error)) from error
    return _Line(where, prompt, later=later)


def _json_record(path: Path, number: int, line: str) -> object:
    try:
        return json.loads(line, object_pairs_hook=_unique)
    except PromptError as error:
        raise PromptError(f"{path}: line {number}: {error}") from error
    except (ValueError, RecursionError) as error:
        raise PromptError(f"{path}: line {number} is not JSON: {error}. Write one object a line") from error


def _unique(pairs: list[tuple[str, object]]) -> dict[str, object]:
    """A JSON object; PromptError for a key that stands there twice, of which only the last would count."""
    record: dict[str, object] = {}
    for key, value in pairs:
        if key in record:
            raise PromptError(f"{key!r} stands there twice. Keep one, or give each its own line")
        record[key] = value
    return record


def _json_line(path: Path, number: int, record: object) -> _Line:
    where = f"{path}: line {number}"
    if not isinstance(record, dict):
        raise PromptError(f'{where} is {type(record).__name__}, and an object is wanted: {{"prompt": "..."}}')
    later: Later = ()
    if "timeline" in record:
        if "prompt" in record or "extended" in record:
            raise PromptError(f"{where}: has a timeline and a prompt. The timeline holds the first prompt: keep one")
        line = _timeline(record["timeline"], where)
        record, later = {key: value for key, value in record.items() if key != "timeline"}, line.later
        record["prompt"] = line.prompt
    known = ("prompt", "extended", "image", "video", "timeline")
    for key, value in record.items():
        if key not in known:
            near = difflib.get_close_matches(key, known, n=1)
            hint = f"Did you mean {near[0]!r}?" if near else f"Use {', '.join(known)}"
            raise PromptError(f"{where}: unknown key {key!r}. {hint}")
        if not isinstance(value, str) or not value.strip():
            raise PromptError(f"{where}: {key} is {value!r}, and text is wanted. Fill it in or leave the key out")
    if "prompt" not in record:
        raise PromptError(f'{where}: has no "prompt". Add it')
    if "image" in record and "video" in record:
        raise PromptError(f"{where}: names both an image and a video. Keep one")
    source = record.get("image", record.get("video"))
    extended = record.get("extended")
    return _Line(
        where,
        " ".join(record["prompt"].split()),
        None if extended is None else " ".join(extended.split()),
        None if source is None else path.parent / source,
        later,
    )


def _with_extended(lines: list[_Line], data_path: Path | str, extended_path: Path) -> list[_Line]:
    longer = _read_folder(extended_path) if extended_path.is_dir() else _text_lines(extended_path)
    if len(lines) != len(longer):
        raise PromptError(
            f"{data_path} has {len(lines)} lines and {extended_path} has {len(longer)}; they are paired line by line. "
            "Make them equally long, for example with `python -m utils.extend_prompts`"
        )
    for line, long_line in zip(lines, longer, strict=True):
        if bool(line.prompt) != bool(long_line.prompt):
            blank, full = (line, long_line) if long_line.prompt else (long_line, line)
            raise PromptError(
                f"{blank.where} is blank, but {full.where} is not; the files are paired line by line. "
                "Fill in the blank line, or empty its partner"
            )
        if line.extended is not None:
            raise PromptError(f"{line.where} has its own 'extended' text. Drop it, or drop --extended_prompt_path")
        if line.later:
            raise PromptError(f"{line.where} has a timeline, used as it stands. Drop --extended_prompt_path")
    return [_Line(a.where, a.prompt, b.prompt or None, a.source) for a, b in zip(lines, longer, strict=True)]


def _check_encodable(line: _Line) -> None:
    """Raise PromptError for half a character: a bad byte of a command line, or a lone surrogate of a .jsonl."""
    try:
        "".join([line.prompt, line.extended or "", *(prompt for _, prompt in line.later)]).encode("utf-8")
    except UnicodeEncodeError as error:
        raise PromptError(f"{line.where}: is not valid Unicode ({error.reason}). Write it in UTF-8") from error


def _check_sources(items: list[PromptItem], lines: list[_Line], i2v: bool) -> None:
    for item in items:
        where = lines[item.index].where
        if i2v and item.source is None:
            raise PromptError(
                f"{where} has no image or video, and --i2v needs one for every prompt. Use a .jsonl with "
                '{"prompt": ..., "image": ...}, a folder of cat.png + cat.txt pairs, or --prompt and --data_path x.png'
            )
        if not i2v and item.source is not None:
            raise PromptError(f"{where} names {item.source.name} to start from. Add --i2v, or leave it out")
        if item.source is not None and not item.source.is_file():
            raise PromptError(f"{where}: {_missing(item.source)}")


def _without_repeats(items: list[PromptItem], lines: list[_Line]) -> list[PromptItem]:
    kept: dict[tuple, PromptItem] = {}
    dropped = []
    for item in items:
        content = None if item.source is None else sha256_file(item.source)
        if kept.setdefault((item.prompt, item.extended, content, item.later), item) is not item:
            dropped.append(lines[item.index].where)
    if dropped:
        more = f" and {len(dropped) - 3} more" if len(dropped) > 3 else ""
        logger.info("left out %d exact repeats of earlier prompts: %s%s", len(dropped), "; ".join(dropped[:3]), more)
    return list(kept.values())
