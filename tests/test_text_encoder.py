"""Prompt -> embedding: the released encoder's own numbers, every layout, and a cache that cannot lie."""
from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from torch import Tensor
from torch.testing import assert_close
from transformers import PreTrainedTokenizerFast, UMT5Config, UMT5EncoderModel, UMT5ForConditionalGeneration

from wan.checkpoint import CheckpointError
from wan.prompt_tokens import PromptTokens, clean_prompt, load_tokenizer
from wan.text_encoder import EmbeddingCache, TextEncoder, check_text_encoder, embed_prompts, filled_up

GOLDEN = Path(__file__).parent / "golden" / "t5_umt5_tiny.safetensors"
TEXT_LEN = 40
WORDS = [
    "<pad>", "</s>", "<unk>", "a", "red", "square", "blue", "circle", "moves", "turns", "slowly", "across", "the",
    "room", "&",
]
State = dict[str, Tensor]


@pytest.fixture(scope="module")
def golden() -> State:
    return load_file(GOLDEN)


@pytest.fixture(scope="module")
def original(golden: State) -> State:
    return {name.removeprefix("sd."): value for name, value in golden.items() if name.startswith("sd.")}


def write_tokenizer(folder: Path) -> Path:
    """A small tokenizer that ends each prompt with </s>, as T5's does, and lowers case."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = Tokenizer(models.WordLevel({word: index for index, word in enumerate(WORDS)}, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder


def tiny_config(state: State) -> UMT5Config:
    vocabulary, width = state["token_embedding.weight"].shape
    return UMT5Config(
        vocab_size=vocabulary, d_model=width, d_kv=8, d_ff=48, num_layers=3, num_heads=4,
        feed_forward_proj="gated-gelu",
    )


def hugging_face(state: State) -> State:
    """The state of transformers' own module, filled by hand block by block."""
    torch.manual_seed(0)
    model = UMT5EncoderModel(tiny_config(state))
    with torch.no_grad():
        model.shared.weight.copy_(state["token_embedding.weight"])
        model.encoder.final_layer_norm.weight.copy_(state["norm.weight"])
        for number, block in enumerate(model.encoder.block):
            attention, feed = block.layer[0], block.layer[1]
            pairs = {
                "norm1.weight": attention.layer_norm.weight, "norm2.weight": feed.layer_norm.weight,
                "pos_embedding.embedding.weight": attention.SelfAttention.relative_attention_bias.weight,
                "ffn.gate.0.weight": feed.DenseReluDense.wi_0.weight, "ffn.fc1.weight": feed.DenseReluDense.wi_1.weight,
                "ffn.fc2.weight": feed.DenseReluDense.wo.weight,
            } | {f"attn.{name}.weight": attention.SelfAttention.get_submodule(name).weight for name in "qkvo"}
            for name, parameter in pairs.items():
                parameter.copy_(state[f"blocks.{number}.{name}"])
    return {name: value.clone() for name, value in model.state_dict().items() if name != "encoder.embed_tokens.weight"}


def write_pth(folder: Path, state: State) -> Path:
    torch.save(state, folder / "models_t5_umt5-xxl-enc-bf16.pth")
    return folder / "models_t5_umt5-xxl-enc-bf16.pth"


def write_wan_repository(folder: Path, state: State) -> Path:
    """The original release: the encoder beside a transformer whose config.json is not the encoder's."""
    write_pth(folder, state)
    (folder / "config.json").write_text(json.dumps({"model_type": "t2v", "dim": 8}))
    save_file({"x": torch.ones(1)}, folder / "diffusion_pytorch_model.safetensors")
    return folder


def write_hugging_face(folder: Path, state: State) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    tiny_config(state).save_pretrained(folder)
    where, state = {}, hugging_face(state)
    for number in (1, 2):
        file = f"model-0000{number}-of-00002.safetensors"
        part = dict(list(state.items())[number - 1 :: 2])
        save_file(part, folder / file)
        where |= dict.fromkeys(part, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": where}))
    return folder


def write_full_model(folder: Path, state: State) -> Path:
    """Encoder and decoder in one file, the shared embedding under its second name only."""
    torch.manual_seed(1)
    full = UMT5ForConditionalGeneration(tiny_config(state)).state_dict() | hugging_face(state)
    full["encoder.embed_tokens.weight"] = full.pop("shared.weight")
    tiny_config(state).save_pretrained(folder)
    torch.save({name: value.clone() for name, value in full.items()}, folder / "pytorch_model.bin")
    return folder


LAYOUTS: dict[str, Callable[[Path, State], Path]] = {
    "original file": write_pth,
    "original folder": write_wan_repository,
    "hugging face folder": write_hugging_face,
    "diffusers repository": lambda folder, state: write_hugging_face(folder / "text_encoder", state).parent,
    "full model": write_full_model,
}


def load(path: Path, tokenizer: Path, text_len: int = TEXT_LEN, dtype: torch.dtype = torch.float32) -> TextEncoder:
    return TextEncoder.load(path, words=PromptTokens.load(tokenizer, text_len), device="cpu", dtype=dtype)


@pytest.fixture
def encoder(tmp_path: Path, original: State) -> TextEncoder:
    return load(write_pth(tmp_path, original), write_tokenizer(tmp_path / "tokenizer"))


@pytest.fixture
def words(tmp_path: Path) -> PromptTokens:
    return PromptTokens.load(write_tokenizer(tmp_path / "tokenizer"), TEXT_LEN, "shapes")


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_matches_the_released_encoder(layout: str, golden: State, original: State, tmp_path: Path) -> None:
    """Whichever way the weights are stored, the embedding is what Wan's own encoder gives, zeros past the end."""
    path = LAYOUTS[layout](tmp_path, original)
    check_text_encoder(path, 32)
    encoder = load(path, write_tokenizer(tmp_path / "tokenizer"))
    assert_close(encoder.encode_ids(golden["ids"], golden["mask"]), golden["out_zero_padded"], rtol=0, atol=1e-5)


def test_the_embedding_is_tied_and_nothing_else_is_random(encoder: TextEncoder, original: State) -> None:
    """Both names of the embedding are one tensor, the one in the file."""
    model = encoder._encoder
    assert model.encoder.embed_tokens.weight is model.shared.weight
    assert torch.equal(model.shared.weight, original["token_embedding.weight"])
    assert not any(parameter.requires_grad for parameter in model.parameters())


def test_a_prompt_is_encoded_the_same_in_any_company(encoder: TextEncoder, words: PromptTokens) -> None:
    """Alone or in a list: the same embedding bit for bit, rows past its tokens zero."""
    prompts = ["a red square moves slowly across the room", "blue circle"]
    together = encoder.encode(prompts)
    assert together.shape == (2, TEXT_LEN, 32)
    for row, prompt in zip(together, prompts, strict=True):
        count = words.count(prompt)
        assert count == len(prompt.split()) + 1
        assert torch.equal(row, encoder.encode([prompt])[0])
        assert row[count:].eq(0).all() and row[:count].ne(0).any(dim=1).all()


def test_tokens_are_those_of_the_cleaned_prompt(encoder: TextEncoder) -> None:
    """White space, entities and case that cleaning and the tokenizer remove leave no trace."""
    assert torch.equal(encoder.encode(["  A  RED\n&amp;amp; blue "]), encoder.encode(["a red & blue"]))


@pytest.mark.parametrize(
    ("text", "clean"),
    [
        ("  a \n\t b\u3000c ", "a b c"),
        ("&amp;lt;b&amp;gt; &eacute;", "<b> é"),
        ("schÃ¶n â€“ l\u2019eau", "schön – l'eau"),
    ],
)
def test_prompts_are_cleaned(text: str, clean: str) -> None:
    """Mojibake, doubly escaped entities, typographic quotes and white space; cleaning twice changes nothing more."""
    assert clean_prompt(text) == clean
    assert clean_prompt(clean_prompt(text)) == clean


def test_a_long_prompt_is_cut_with_one_warning(
    tmp_path: Path, original: State, caplog: pytest.LogCaptureFixture,
) -> None:
    """The end mark stays, the loss is counted, and a prompt that just fits is silent; also where all is cached."""
    encoder = load(write_pth(tmp_path, original), write_tokenizer(tmp_path), text_len=6)
    words, cache = PromptTokens.load(tmp_path, 6), EmbeddingCache(tmp_path / "cache", "id", 6)
    long = "a red square moves slowly across the room turns"
    fitting = embed_prompts(["a red square moves slowly"], cache, words, lambda: encoder).popitem()[1]
    assert not caplog.records
    cut = embed_prompts([long, long], cache, words, lambda: encoder)[long]
    assert [record.levelno for record in caplog.records] == [logging.WARNING]
    assert "10 tokens is longer than the 6" in caplog.messages[0]
    assert "last 4 are lost: a red square moves" in caplog.messages[0]
    assert torch.equal(cut, fitting)
    assert words.count(long) == 10
    embed_prompts([long], cache, words, lambda: pytest.fail("the embedding is cached"))
    assert len(caplog.messages) == 2 and caplog.messages[0] == caplog.messages[1]


def test_unknown_words_are_told_in_one_line(words: PromptTokens, caplog: pytest.LogCaptureFixture) -> None:
    """Each once, as written, punctuation left out; nothing is said of a prompt that is understood."""
    words.warn("A red Panda, a PANDA and a tree!")
    assert caplog.messages == [
        "the model does not know these words, and will not show them: Panda, PANDA, and, tree. It understands shapes"
    ]
    assert words.unknown_words("a red square & a blue circle") == []
    many = " ".join(f"w{number}" for number in range(11))
    words.warn(many)
    assert "w6, w7 and 3 more. It" in caplog.messages[1] and len(words.unknown_words(many)) == 11
    words.warn("z" * 9999 + many)
    assert max(map(len, caplog.messages[2:])) < 300
    assert words.unknown_words("a \u2605 !? + blue") == ["\u2605"]  # pictures are words, other signs are none


def test_a_tokenizer_that_spells_knows_every_word(tmp_path: Path) -> None:
    """Only a list of words lacks words: subword and byte tokenizers write any of them in pieces."""
    tokenizer = Tokenizer(models.BPE({"a": 0, "b": 1, "<unk>": 2}, [], unk_token="<unk>"))
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    assert PromptTokens.load(tmp_path, 5).unknown_words("a zebra") == []


def test_a_foreign_tokenizer_is_refused(encoder: TextEncoder) -> None:
    """Ids past the embedding are an error before the lookup, not an out-of-range read on the device."""
    with pytest.raises(ValueError, match="token id 96 does not suit an encoder of 96 ids"):
        encoder.encode_ids(torch.tensor([[3, 96]]), torch.ones(1, 2))


def test_an_encoder_without_words_takes_ids(encoder: TextEncoder, original: State, tmp_path: Path) -> None:
    """Without a tokenizer it embeds ids like the one that has one, and says what it lacks for prompts."""
    torch.save(original, tmp_path / "bare.pth")
    bare = TextEncoder.load(tmp_path / "bare.pth", words=None, device="cpu", dtype=torch.float32)
    ids = torch.tensor([[3, 4, 5, 1]])
    assert torch.equal(bare.encode_ids(ids, torch.ones(1, 4)), encoder.encode(["a red square"])[:, :4])
    with pytest.raises(RuntimeError, match="no tokenizer. Load it with words="):
        bare.encode(["a red square"])


@pytest.mark.parametrize("place", [".", "tokenizer", "google/umt5-xxl"])
def test_tokenizers_are_found(place: str, tmp_path: Path) -> None:
    """In the folder itself or where the two releases keep it, and by the file's own path."""
    file = write_tokenizer(tmp_path / place) / "tokenizer.json"
    for path in (tmp_path, file):
        assert load_tokenizer(path)("Red SQUARE").input_ids == [4, 5, 1]


def test_the_tokenizer_file_rules_over_its_class(tmp_path: Path) -> None:
    """A folder that names T5's class, as the released one does, still tokenizes by its tokenizer.json."""
    write_tokenizer(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "T5Tokenizer", "extra_ids": 0}))
    assert load_tokenizer(tmp_path)("Red SQUARE").input_ids == [4, 5, 1]


def test_a_tokenizer_is_also_read_by_transformers(tmp_path: Path) -> None:
    """Without a tokenizer.json the folder is left to AutoTokenizer; an empty or broken one is explained."""
    with pytest.raises(CheckpointError, match="no tokenizer. Looked for tokenizer.json"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text("{")
    with pytest.raises(CheckpointError, match="cannot be read"):
        load_tokenizer(tmp_path)
    write_tokenizer(tmp_path)
    PreTrainedTokenizerFast(tokenizer_file=str(tmp_path / "tokenizer.json")).save_pretrained(tmp_path / "saved")
    assert load_tokenizer(tmp_path / "saved")("red").input_ids == [4, 1]


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        ("cut", "cut off or damaged"), ("list", "config.json: holds a list, not an object"),
        ("deep", "config.json: cannot be read"), ("number", "not a shard index"), ("width", "reads text_dim=33"),
        ("shape", "another shape"), ("words", "describes no umT5 encoder"),
    ],
)
def test_headers_tell_a_wrong_encoder(damage: str, message: str, original: State, tmp_path: Path) -> None:
    """Found before any weight is read: by the headers and the JSON beside them."""
    folder = write_hugging_face(tmp_path / "encoder", original)
    shard, config = folder / "model-00002-of-00002.safetensors", folder / "config.json"
    values = json.loads(config.read_text())
    if damage == "cut":
        shard.write_bytes(shard.read_bytes()[:-9])
    elif damage == "number":
        (folder / "model.safetensors.index.json").write_text('{"weight_map": {"shared.weight": 1}}')
    elif damage != "width":
        config.write_text({
            "list": "[]", "deep": "[" * 100_000, "shape": json.dumps(values | {"d_ff": 47}),
            "words": json.dumps(values | {"num_layers": "three"}),
        }[damage])
    with pytest.raises(CheckpointError, match=message):
        check_text_encoder(folder, 33 if damage == "width" else 32)


def test_wrong_encoders_are_explained(tmp_path: Path, original: State) -> None:
    """No encoder, another model, a layer short, half precision: each says so before anything runs."""
    words = write_tokenizer(tmp_path / "words")
    with pytest.raises(CheckpointError, match="no text encoder.*found 0"):
        load(words, words)
    torch.save({"decoder.conv1.weight": torch.ones(1)}, tmp_path / "vae.pth")
    with pytest.raises(CheckpointError, match="not a umT5 encoder.*token_embedding.weight"):
        load(tmp_path / "vae.pth", words)
    short = {name: value for name, value in original.items() if name != "blocks.1.ffn.fc2.weight"}
    with pytest.raises(CheckpointError, match=r"missing \(1\): encoder.block.1.layer.1.DenseReluDense.wo.weight"):
        load(write_pth(tmp_path, short), words)
    with pytest.raises(ValueError, match="umT5 overflows in half precision"):
        load(write_pth(tmp_path, original), words, dtype=torch.float16)


def embedding(rows: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.cat([torch.randn(rows, 8), torch.zeros(TEXT_LEN - rows, 8)]).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows", [0, 1, 7, TEXT_LEN])
def test_cache_gives_back_what_was_put(rows: int, dtype: torch.dtype, tmp_path: Path) -> None:
    """Same bits and dtype; on disk only the rows that say something."""
    cache, value = EmbeddingCache(tmp_path / "cache", "id", TEXT_LEN), embedding(rows, dtype)
    assert cache.get("a prompt") is None
    cache.put("a prompt", value)
    found = cache.get("  a   prompt ")  # the same prompt once cleaned
    assert found.dtype == dtype and torch.equal(found, value)
    (file,) = (tmp_path / "cache").iterdir()
    with safe_open(file, "pt") as entry:
        assert entry.get_tensor("embedding").shape == (max(rows, 1), 8)


def test_cache_keys_tell_apart_what_differs(tmp_path: Path) -> None:
    """Another prompt, encoder or text length never finds this entry, even under its file name."""
    cache = EmbeddingCache(tmp_path, "id", TEXT_LEN)
    cache.put("a prompt", embedding(3))
    others = [
        (cache, "b prompt"), (EmbeddingCache(tmp_path, "other", TEXT_LEN), "a prompt"),
        (EmbeddingCache(tmp_path, "id", 41), "a prompt"),
    ]
    assert [other.get(prompt) for other, prompt in others] == [None] * 3
    (file,) = tmp_path.iterdir()
    cache.put("b prompt", embedding(3))
    (other,) = set(tmp_path.iterdir()) - {file}
    file.replace(other)
    assert cache.get("b prompt") is None
    with pytest.raises(ValueError, match="the cache holds"):
        cache.put("a prompt", torch.zeros(3, 8))


@pytest.mark.parametrize("damage", ["cut", "empty", "flipped", "text"])
def test_a_damaged_entry_is_a_miss(damage: str, tmp_path: Path) -> None:
    """Cut, emptied, one bit flipped, overwritten: never returned, and storing again repairs it."""
    cache, value = EmbeddingCache(tmp_path, "id", TEXT_LEN), embedding(5)
    cache.put("a prompt", value)
    (file,) = tmp_path.iterdir()
    content = file.read_bytes()
    flipped = content[:-1] + bytes([content[-1] ^ 1])
    file.write_bytes({"cut": content[:-9], "empty": b"", "flipped": flipped, "text": b"not it"}[damage])
    assert cache.get("a prompt") is None
    cache.put("a prompt", value)
    assert torch.equal(cache.get("a prompt"), value)


def test_a_failed_write_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A crash between writing and naming leaves neither an entry nor a temporary file."""
    monkeypatch.setattr("os.replace", lambda *names: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        EmbeddingCache(tmp_path, "id", TEXT_LEN).put("a prompt", embedding(2))
    assert not list(tmp_path.iterdir())


def test_the_encoder_is_loaded_only_when_needed(encoder: TextEncoder, words: PromptTokens, tmp_path: Path) -> None:
    """Cached and fresh embeddings are the same; a second run never builds an encoder, a third only for what is new."""
    cache, loads = EmbeddingCache(tmp_path / "cache", "id", TEXT_LEN), []

    def load_encoder() -> TextEncoder:
        loads.append(1)
        return encoder

    prompts = ["a red square", "blue circle", "a red square"]
    first = embed_prompts(prompts, cache, words, load_encoder)
    assert list(first) == prompts[:2] and len(loads) == 1
    again = embed_prompts(prompts, cache, words, load_encoder)
    assert len(loads) == 1
    more = embed_prompts([*prompts, "turns"], cache, words, load_encoder)
    assert len(loads) == 2
    for prompt in prompts:
        expected = encoder.encode([prompt])[0]
        assert all(torch.equal(filled_up(found[prompt], TEXT_LEN), expected) for found in (first, again, more))
        assert len(first[prompt]) == len(prompt.split()) + 1  # its words and its end, and not what fills it up


def test_an_unwritable_cache_costs_only_time(
    encoder: TextEncoder, words: PromptTokens, tmp_path: Path, caplog: pytest.LogCaptureFixture,
) -> None:
    """Where nothing can be stored the embeddings are still returned, with a warning."""
    (tmp_path / "file").write_text("in the way")
    cache = EmbeddingCache(tmp_path / "file" / "cache", "id", TEXT_LEN)
    found = embed_prompts(["a red square"], cache, words, lambda: encoder)
    assert torch.equal(filled_up(found["a red square"], TEXT_LEN), encoder.encode(["a red square"])[0])
    assert "cannot store a prompt embedding" in caplog.text
