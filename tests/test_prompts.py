"""Laws of prompt lists: an index always means the same line, and nothing is lost, doubled or misread."""
from __future__ import annotations

import logging
import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from utils.prompts import PromptError, PromptItem, load_prompts, read_text_lines, shard

PROMPTS = Path(__file__).resolve().parents[1] / "prompts"


def load(data_path=None, *, prompt=None, extended=None, i2v=False) -> list[PromptItem]:
    return load_prompts(prompt=prompt, data_path=data_path, extended_prompt_path=extended, i2v=i2v)


def put(path: Path, content: str | bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def picture(path: Path, level: int = 100) -> Path:
    Image.fromarray(np.full((4, 4, 3), level, np.uint8)).save(path)
    return path


def test_every_way_of_writing_lines_gives_the_same_prompts(tmp_path):
    """Line ends, byte-order mark, blank lines at the end and spaces around do not change the prompts."""
    expected = [PromptItem(0, "a cat", None, None), PromptItem(2, "ein Hündchen 犬", None, None)]
    plain = "a cat\n\nein Hündchen 犬\n"
    ways = [plain, plain[:-1], plain + "\n \n", plain.replace("\n", "\r\n"), plain.replace("\n", "\r")]
    ways += ["\ufeff" + plain, plain.replace("a cat", "  a cat\t")]
    for number, way in enumerate(ways):
        assert load(put(tmp_path / f"{number}.txt", way)) == expected


def test_characters_that_only_look_like_line_ends_stay_inside(tmp_path):
    """Form feeds and Unicode separators do not cut a prompt in two, so line numbers match an editor's."""
    lines = ["a\x0cb", "c\u2028d", "e\x85f"]
    assert [item.prompt for item in load(put(tmp_path / "p.txt", "\n".join(lines)))] == ["a b", "c d", "e f"]


def test_single_prompt_equals_a_file_of_one_line(tmp_path):
    """--prompt and a one-line file are the same list; line breaks in an argument become spaces."""
    assert load(prompt=" a cat\n sits ") == load(put(tmp_path / "p.txt", "a cat sits\n"))


def test_jsonl_equals_txt_with_the_same_content(tmp_path):
    """The two formats meet in the same items; extended text and sources come along."""
    text = put(tmp_path / "p.txt", "a  cat\n\na\tdog\n")
    longer = put(tmp_path / "long.txt", "a long cat\n\na  long dog\n")
    rows = '{"prompt": "a cat", "extended": "a long\\ncat"}\n\n{"prompt": "a dog", "extended": "a long dog"}\n'
    assert load(put(tmp_path / "p.jsonl", rows)) == load(text, extended=longer)
    assert [item.text for item in load(text, extended=longer)] == ["a long cat", "a long dog"]
    assert [item.text for item in load(text)] == ["a cat", "a dog"]


def test_folder_equals_its_files_in_order(tmp_path):
    """A folder is its .txt files one after the other; other files are no prompts."""
    put(tmp_path / "d/b.txt", "three\n")
    put(tmp_path / "d/a.txt", "one\n\ntwo\n")
    put(tmp_path / "d/README.md", "not a prompt")
    joined = put(tmp_path / "p.txt", "one\n\ntwo\nthree\n")
    assert load(tmp_path / "d") == load(joined)
    assert load(tmp_path / "d", extended=joined) == load(joined, extended=tmp_path / "d")


def test_image_to_video_sources(tmp_path):
    """A .jsonl, a folder of pairs and --prompt with an image give the same item."""
    put(tmp_path / "d/cat.txt", "a cat\n")
    cat = picture(tmp_path / "d/cat.png")
    rows = put(tmp_path / "p.jsonl", '{"prompt": "a cat", "image": "d/cat.png"}')
    expected = [PromptItem(0, "a cat", None, cat)]
    assert load(tmp_path / "d", i2v=True) == load(rows, i2v=True) == load(cat, prompt="a cat", i2v=True) == expected


def test_exact_repeats_are_made_once_and_told(tmp_path, caplog):
    """Only (prompt, extended, source bytes) that are all equal count as repeats; indices stay those of the file."""
    text = put(tmp_path / "p.txt", "a\nb\na\na\n")
    with caplog.at_level(logging.INFO, logger="utils.prompts"):
        assert [(i.index, i.prompt) for i in load(text)] == [(0, "a"), (1, "b")]
    assert len(caplog.records) == 1 and "line 3" in caplog.text and "line 4" in caplog.text
    longer = put(tmp_path / "long.txt", "A\nB\nA\nA2\n")
    assert [i.index for i in load(text, extended=longer)] == [0, 1, 3]
    picture(tmp_path / "x.png")
    picture(tmp_path / "same.png")
    picture(tmp_path / "other.png", 200)
    rows = "\n".join(f'{{"prompt": "a", "image": "{name}.png"}}' for name in ("x", "same", "other"))
    assert [i.index for i in load(put(tmp_path / "p.jsonl", rows), i2v=True)] == [0, 2]


@pytest.mark.parametrize("world_size", [1, 2, 3, 7, 20])
def test_shards_hold_every_item_once(world_size):
    """All ranks together hold each item exactly once, in order, and never differ by more than one item."""
    items = list(range(13))
    shards = [shard(items, rank, world_size) for rank in range(world_size)]
    assert sorted(sum(shards, [])) == items and all(part == sorted(part) for part in shards)
    assert max(map(len, shards)) - min(map(len, shards)) <= 1
    with pytest.raises(ValueError, match="not one of"):
        shard(items, world_size, world_size)


BAD_FILES = {
    "empty": ("p.txt", b"", "is empty"),
    "only blank lines": ("p.txt", b"\n \r\n\t\n", "is empty"),
    "binary": ("p.txt", b"PK\x03\x04\x00\x00", "binary"),
    "utf-16": ("p.txt", "a cat".encode("utf-16"), "UTF-16"),
    "latin-1": ("p.txt", "a cat\n\na caf\xe9\n".encode("latin-1"), "line 3 is not UTF-8 .byte 0xe9"),
    "a video": ("p.mp4", b"\x00\x00\x00\x18ftypmp42", "image or video, not prompts"),
    "a table": ("p.csv", b"prompt,seed\na cat,1", ".csv is not read. Give a .txt"),
    "json in one piece": ("p.json", b'[{"prompt": "a"}]', ".json is not read. .* a .jsonl"),
    "not json": ("p.jsonl", b'{"prompt": "a"}\n{"prompt": ', "line 2 is not JSON"),
    "a list": ("p.jsonl", b'["a"]', "line 1 is list"),
    "no prompt": ("p.jsonl", b'{"extended": "a"}', 'line 1: has no "prompt"'),
    "wrong key": ("p.jsonl", b'{"promt": "a"}', "unknown key 'promt'. Did you mean 'prompt'?"),
    "empty prompt": ("p.jsonl", b'\n{"prompt": " "}', "line 2: prompt is ' '"),
    "two sources": ("p.jsonl", b'{"prompt": "a", "image": "a.png", "video": "a.mp4"}', "both an image and a video"),
    "source without i2v": ("p.jsonl", b'{"prompt": "a", "image": "a.png"}', "Add --i2v"),
}


@pytest.mark.parametrize("case", BAD_FILES)
def test_bad_files_say_what_and_where(tmp_path, case):
    """Every unusable file is a PromptError that names the file and, where there is one, the line."""
    name, content, said = BAD_FILES[case]
    with pytest.raises(PromptError, match=said) as caught:
        load(put(tmp_path / name, content))
    assert name in str(caught.value)


def test_a_pipe_is_no_missing_file(tmp_path):
    """What is there, but no plain file, is not said to be missing: `--data_path <(command)`, /dev/stdin."""
    os.mkfifo(tmp_path / "p.txt")
    with pytest.raises(PromptError, match="p.txt: is no plain file. Write"):
        load(tmp_path / "p.txt")


def test_missing_files_name_the_nearest_and_the_remedy(tmp_path):
    """A wrong name is answered with the right one; MovieGen's set with the command that fetches it."""
    put(tmp_path / "showcase.txt", "a")
    put(tmp_path / "other.txt", "a")
    with pytest.raises(PromptError, match=r"no such file\. Nearest in .*: showcase\.txt"):
        load(tmp_path / "showcse.txt")
    with pytest.raises(PromptError, match="folder .*missing does not exist"):
        load(tmp_path / "missing" / "deep" / "p.txt")
    with pytest.raises(PromptError, match="python -m utils.download --prompts"):
        load(tmp_path / "MovieGenVideoBench_extended.txt")
    with pytest.raises(PromptError, match="no prompt given"):
        load()


def test_extended_prompts_must_line_up(tmp_path):
    """Different counts are told with both numbers; a blank line must be blank in both files."""
    text = put(tmp_path / "p.txt", "a\n\nc\n")
    with pytest.raises(PromptError, match="has 3 lines and .* has 2"):
        load(text, extended=put(tmp_path / "two.txt", "A\nC\n"))
    with pytest.raises(PromptError, match=r"p.txt: line 2 is blank, but .*full.txt: line 2 is not"):
        load(text, extended=put(tmp_path / "full.txt", "A\nB\nC\n"))
    with pytest.raises(PromptError, match=r"holes.txt: line 1 is blank, but .*p.txt: line 1 is not"):
        load(text, extended=put(tmp_path / "holes.txt", "\n\nC\n"))
    assert [item.extended for item in load(text, extended=put(tmp_path / "A.txt", "A\n\nC\n\n"))] == ["A", "C"]


def test_prompts_without_an_image_are_refused_for_i2v(tmp_path):
    """i2v names the line, the image or the text that lacks its partner."""
    (tmp_path / "d").mkdir()
    picture(tmp_path / "d/cat.png")
    with pytest.raises(PromptError, match=r"p.txt: line 2 has no image"):
        load(put(tmp_path / "p.txt", "\na cat"), i2v=True)
    with pytest.raises(PromptError, match="line 1: .*no such file.*Nearest in .*cat.png"):
        load(put(tmp_path / "p.jsonl", '{"prompt": "a", "image": "d/cta.png"}'), i2v=True)
    with pytest.raises(PromptError, match=r"cat.png: has no prompt.*cat.txt"):
        load(tmp_path / "d", i2v=True)
    put(tmp_path / "d/cat.txt", "a\nb\n")
    with pytest.raises(PromptError, match="2 prompts for one cat.png"):
        load(tmp_path / "d", i2v=True)
    put(tmp_path / "d/cat.txt", "a\n")
    put(tmp_path / "d/dog.txt", "b\n")
    with pytest.raises(PromptError, match="dog.txt: no image or video"):
        load(tmp_path / "d", i2v=True)
    with pytest.raises(PromptError, match="Give one"):
        load(tmp_path / "p.txt", prompt="a")
    with pytest.raises(PromptError, match="--prompt is empty"):
        load(prompt=" \n")


def test_a_large_binary_file_is_not_read_whole(tmp_path):
    """A checkpoint given by mistake is recognised by its first bytes, without reading gigabytes."""
    path = tmp_path / "model.pt"
    with path.open("wb") as file:
        file.truncate(1 << 40)  # sparse: reading it whole would run out of memory
    with pytest.raises(PromptError, match="binary"):
        read_text_lines(path)


def test_shipped_prompts_keep_their_promises():
    """32 long prompts of 90 to 130 words with aligned short ones, single files, and 6 tiny ones; ASCII, no repeats."""
    longer = load(PROMPTS / "showcase_short.txt", extended=PROMPTS / "showcase.txt")
    assert len(longer) == 32 and all(90 <= len(item.text.split()) <= 130 for item in longer)
    assert all(len(item.prompt.split()) <= 16 for item in longer)
    for name in ("line_0010.txt", "line_0043.txt"):
        (item,) = load(PROMPTS / "MovieGenVideoBench_txt" / name)
        assert len(item.text.split()) >= 90
    assert len(load(PROMPTS / "MovieGenVideoBench_txt")) == 2
    tiny = load(PROMPTS / "tiny.txt")
    assert len(tiny) == 6 and all(item.prompt.endswith(".") and item.prompt.isascii() for item in tiny)
