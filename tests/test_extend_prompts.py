"""Laws of lengthening prompts: lines stay aligned, no answer is asked for twice, nothing half-made is left."""
from __future__ import annotations

from pathlib import Path

import pytest

from utils import extend_prompts as module
from utils.extend_prompts import INSTRUCTION, ExtendError, extend, load_chat_model, main
from utils.prompts import load_prompts


class Model:
    """A generate function that notes what it was asked; `answer` makes the reply to a prompt."""

    def __init__(self, answer=lambda prompt: f"{prompt}, seen\n at length."):
        self.answer = answer
        self.asked: list[list[str]] = []

    def load(self):
        return self

    def __call__(self, prompts: list[str]) -> list[str]:
        self.asked.append(list(prompts))
        return [self.answer(prompt) for prompt in prompts]


def run(lines, model: Model, folder: Path, **options) -> list[str]:
    return extend(lines, model=options.pop("name", "m"), load=model.load, cache_folder=folder, **options)


def test_lines_stay_aligned(tmp_path):
    """One line out for one line in: blank stays blank, line breaks are gone, repeats are asked once."""
    model = Model()
    longer = run(["a cat", "", "a dog", "a cat"], model, tmp_path)
    assert longer == ["a cat, seen at length.", "", "a dog, seen at length.", "a cat, seen at length."]
    assert model.asked == [["a cat", "a dog"]]


@pytest.mark.parametrize("batch", [1, 2, 3, 5, 100])
def test_batches_do_not_change_the_answers(tmp_path, batch):
    """Every batch size gives the same lines and asks for each once."""
    lines, model = [f"prompt {i}" for i in range(5)], Model()
    assert run(lines, model, tmp_path, batch=batch) == [f"{line}, seen at length." for line in lines]
    assert sum(model.asked, []) == lines and max(map(len, model.asked)) == min(batch, 5)


def test_a_second_run_asks_nothing(tmp_path):
    """All answers cached: the model is not even loaded. Another model or another prompt is asked."""
    first = run(["a", "b"], Model(), tmp_path)
    assert extend(["b", "a"], model="m", load=_never, cache_folder=tmp_path) == first[::-1]
    other, more = Model(), Model()
    run(["a"], other, tmp_path, name="another")
    run(["a", "c"], more, tmp_path)
    assert other.asked == [["a"]] and more.asked == [["c"]]


def _never():
    raise AssertionError("the model was loaded although every answer is cached")


def test_an_interrupted_run_goes_on(tmp_path, monkeypatch, capsys):
    """Ctrl-C: status 130 and no output file; the next run asks only for the rest and the file is whole."""
    short, longer = tmp_path / "short.txt", tmp_path / "long.txt"
    short.write_text("a\nb\n\nc\n")
    stopping = Model(lambda prompt: _interrupt() if prompt == "c" else prompt * 3)
    monkeypatch.setattr(module, "load_chat_model", lambda name, device, revision: stopping)
    arguments = ["--input", str(short), "--output", str(longer), "--batch", "1", "--cache_folder", str(tmp_path / "c")]
    assert main(arguments) == 130 and not longer.exists()
    going_on = Model(lambda prompt: prompt * 3)
    monkeypatch.setattr(module, "load_chat_model", lambda name, device, revision: going_on)
    assert main(arguments) == 0 and going_on.asked == [["c"]]
    assert longer.read_text() == "aaa\nbbb\n\nccc\n"
    items = load_prompts(prompt=None, data_path=short, extended_prompt_path=longer, i2v=False)
    assert [(i.index, i.prompt, i.text) for i in items] == [(0, "a", "aaa"), (1, "b", "bbb"), (3, "c", "ccc")]
    assert "wrote 3 prompts" in capsys.readouterr().out


def _interrupt():
    raise KeyboardInterrupt


def test_damaged_cache_entries_are_asked_again(tmp_path):
    """A torn or foreign cache file is a miss, not a crash."""
    run(["a", "b"], Model(), tmp_path)
    torn, foreign = sorted(tmp_path.iterdir())
    torn.write_bytes(torn.read_bytes()[:-5])
    foreign.write_text("[]")
    again = Model()
    run(["a", "b"], again, tmp_path)
    assert again.asked == [["a", "b"]]


@pytest.mark.parametrize(
    ("reply", "kept"),
    [
        ("<think>hm\nhm</think>\n\nA cat.", "A cat."),
        ('"A cat sits.\nIt looks."', "A cat sits. It looks."),
        ("“A cat.”", "A cat."),
        ('A cat says "hello"', 'A cat says "hello"'),
    ],
)
def test_only_the_paragraph_is_kept(tmp_path, reply, kept):
    """Thinking aloud, quotation marks around the whole, and line breaks go; the text itself stays."""
    assert run(["a"], Model(lambda prompt: reply), tmp_path) == [kept]


def test_useless_answers_are_errors(tmp_path):
    """An empty answer, only thoughts, or a wrong number of answers stops with the prompt or model named."""
    for reply in ("", " \n", "<think>for ever"):
        with pytest.raises(ExtendError, match="gave no text for the prompt 'a'"):
            run(["a"], Model(lambda prompt, reply=reply: reply), tmp_path)
    with pytest.raises(ExtendError, match="1 answers to 2 prompts"):
        extend(["a", "b"], model="m", load=lambda: lambda prompts: ["one"], cache_folder=tmp_path)
    with pytest.raises(ExtendError, match="--batch 0"):
        run(["a"], Model(), tmp_path, batch=0)


@pytest.mark.parametrize(
    ("source", "target", "said"),
    [
        ("missing.txt", "long.txt", "no such file"),
        ("empty.txt", "long.txt", "is empty"),
        ("short.txt", "short.txt", "is the input file"),
        ("short.txt", "none/long.txt", "there is no folder"),
    ],
)
def test_bad_paths_are_told_before_the_model_loads(tmp_path, monkeypatch, capsys, source, target, said):
    """Wrong paths end with one line and status 1, and the input stays as it is."""
    (tmp_path / "short.txt").write_text("a cat\n")
    (tmp_path / "empty.txt").write_text("")
    monkeypatch.setattr(module, "load_chat_model", lambda *a, **k: _never())
    assert main(["--input", str(tmp_path / source), "--output", str(tmp_path / target)]) == 1
    assert said in capsys.readouterr().err and (tmp_path / "short.txt").read_text() == "a cat\n"


# a real model of transformers, tiny and random ------------------------------------------------------


@pytest.fixture(scope="module")
def chat_model(tmp_path_factory) -> Path:
    """A folder with a random two-layer Qwen2 and a character-level tokenizer with a chat template."""
    torch = pytest.importorskip("torch")
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

    folder = tmp_path_factory.mktemp("chat")
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate(["<|endoftext|>", *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|endoftext|>")
    fast.chat_template = "{% for m in messages %}[{{ m['role'] }}] {{ m['content'] }}\n{% endfor %}[answer] "
    fast.save_pretrained(folder)
    torch.manual_seed(0)
    Qwen2ForCausalLM(
        Qwen2Config(
            vocab_size=len(vocabulary), hidden_size=16, intermediate_size=16, num_hidden_layers=2,
            num_attention_heads=2, num_key_value_heads=2, bos_token_id=None, eos_token_id=0,
        )
    ).save_pretrained(folder)
    return folder


def test_transformers_model_answers_greedily_and_alone_as_in_a_batch(chat_model, monkeypatch):
    """The first token of each answer is the model's own argmax after instruction and prompt, also when padded."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    monkeypatch.setattr(module, "MAX_NEW_TOKENS", 1)
    monkeypatch.setattr(module, "_whole_sentences", lambda text: text)
    prompts = ["a cat", "a dog runs over a long field", "x"]
    answers = load_chat_model(str(chat_model), device="cpu", revision=None)(prompts)
    model, tokenizer = AutoModelForCausalLM.from_pretrained(chat_model), AutoTokenizer.from_pretrained(chat_model)
    for prompt, answer in zip(prompts, answers, strict=True):
        tokens = tokenizer(f"[system] {INSTRUCTION}\n[user] {prompt}\n[answer] ", return_tensors="pt").input_ids
        with torch.no_grad():
            best = model(tokens).logits[0, -1].argmax()
        assert answer == tokenizer.decode(best, skip_special_tokens=True)


def test_an_answer_cut_by_the_limit_ends_with_a_sentence():
    """What the token limit left unfinished is dropped; a text without a full stop is kept."""
    assert module._whole_sentences("A cat. It is 3.5 m long. It lo") == "A cat. It is 3.5 m long."
    assert module._whole_sentences("A cat sits") == "A cat sits"


def test_command_line_with_a_real_model(chat_model, tmp_path, capsys, monkeypatch):
    """End to end through transformers: aligned output, and models without a chat template are refused."""
    monkeypatch.setattr(module, "MAX_NEW_TOKENS", 12)
    (tmp_path / "short.txt").write_text("a cat\n\na dog\n")
    arguments = ["--input", str(tmp_path / "short.txt"), "--output", str(tmp_path / "long.txt"), "--device", "cpu"]
    arguments += ["--cache_folder", str(tmp_path / "cache"), "--model"]
    assert main([*arguments, str(chat_model)]) == 0
    lines = (tmp_path / "long.txt").read_text().split("\n")
    assert len(lines) == 4 and lines[0] and lines[1] == "" and lines[2] and lines[3] == ""
    (chat_model / "chat_template.jinja").rename(tmp_path / "gone.jinja")
    assert main([*arguments, f"{chat_model}/"]) == 1 and "no chat template" in capsys.readouterr().err
    assert main([*arguments, str(tmp_path / "nothing")]) == 1 and "cannot be loaded" in capsys.readouterr().err
