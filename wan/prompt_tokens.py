"""Prompts -> token ids, and what of a prompt the model cannot read.

Knows the tokenizer, not the encoder.
"""

from __future__ import annotations

import html
import logging
import re
import unicodedata
from pathlib import Path

import ftfy
from tokenizers.models import WordLevel
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from wan.checkpoint import CheckpointError

log = logging.getLogger(__name__)

_FOLDERS = (".", "tokenizer", "google/umt5-xxl")
_SHOWN_WORDS, _SHOWN_LETTERS = 8, 40


def clean_prompt(text: str) -> str:
    """Repair broken encoding, resolve HTML entities (also doubly escaped ones) and collapse white space.

    Source: the text preparation that Wan2.1 was trained with.
    """
    text = html.unescape(html.unescape(ftfy.fix_text(text)))
    return re.sub(r"\s+", " ", text).strip()


class PromptTokens:
    """A tokenizer, and the number of tokens that the model reads."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, text_len: int, understands: str | None = None) -> None:
        """Args: `understands` says what a tokenizer that is a list of words has words for; shown with unknown ones."""
        if text_len < 1:
            raise ValueError(f"text_len={text_len} must be at least 1: the number of text tokens that the model reads.")
        self.text_len = text_len
        self._tokenizer = tokenizer
        self._understands = understands

    @classmethod
    def load(cls, path: Path, text_len: int, understands: str | None = None) -> PromptTokens:
        """Raises: as `load_tokenizer`."""
        return cls(load_tokenizer(path), text_len, understands)

    def count(self, prompt: str) -> int:
        """Tokens of the cleaned prompt, end mark included, before any cutting."""
        return len(self._tokenizer(clean_prompt(prompt), verbose=False).input_ids)

    def ids(self, prompt: str) -> list[int]:
        """Token ids of the cleaned prompt; one of more than text_len tokens is cut, keeping its end mark."""
        text = clean_prompt(prompt)
        return list(self._tokenizer(text, truncation=True, max_length=self.text_len, verbose=False).input_ids)

    def warn(self, prompt: str) -> None:
        """One line in the log about what a cut loses, and one about words that the tokenizer does not have."""
        count = self.count(prompt)
        if count > self.text_len:
            log.warning(
                "prompt of %d tokens is longer than the %d the model reads; its last %d are lost: %s ...",
                count, self.text_len, count - self.text_len, clean_prompt(prompt)[:_SHOWN_LETTERS],
            )
        unknown = self.unknown_words(prompt)
        if unknown:
            more = f" and {len(unknown) - _SHOWN_WORDS} more" if len(unknown) > _SHOWN_WORDS else ""
            log.warning(
                "the model does not know these words, and will not show them: %s%s. It understands %s",
                ", ".join(word[:_SHOWN_LETTERS] for word in unknown[:_SHOWN_WORDS]), more,
                self._understands or "the words of its tokenizer alone",
            )

    def unknown_words(self, prompt: str) -> list[str]:
        """Words and pictures of the prompt that a tokenizer of whole words lacks, each once; others spell any word."""
        tokenizer, text = self._tokenizer, clean_prompt(prompt)
        model = tokenizer.backend_tokenizer.model if isinstance(tokenizer, PreTrainedTokenizerFast) else None
        if not isinstance(model, WordLevel):
            return []
        found = tokenizer(text, verbose=False, return_offsets_mapping=True)
        unknown = model.token_to_id(model.unk_token)
        pairs = zip(found.input_ids, found.offset_mapping, strict=True)
        words = [text[start:stop] for token, (start, stop) in pairs if token == unknown]
        return list(dict.fromkeys(word for word in words if any(map(_tells, word))))


def _tells(character: str) -> bool:
    """Whether it may stand for a thing: a letter, a digit, a picture."""
    return character.isalnum() or unicodedata.category(character) == "So"


def load_tokenizer(path: Path) -> PreTrainedTokenizerBase:
    """Load a tokenizer from `tokenizer.json` or a folder that transformers can read.

    tokenizer.json comes first: it is complete, while the T5 class that the released folder names
    rebuilds normalisation from scratch in transformers 5 and can give other ids.

    Raises:
        CheckpointError: no tokenizer there, or one that cannot be read.
    """
    folders = [path / folder for folder in _FOLDERS]
    files = [path] if path.is_file() else [folder / "tokenizer.json" for folder in folders]
    try:
        for file in files:
            if file.is_file():
                return PreTrainedTokenizerFast(tokenizer_file=str(file))
        for folder in folders:
            if (folder / "tokenizer_config.json").is_file() or (folder / "spiece.model").is_file():
                return AutoTokenizer.from_pretrained(str(folder), local_files_only=True)
    except Exception as error:  # the tokenizer libraries raise bare Exception on a bad file
        raise CheckpointError(f"{path}: the tokenizer there cannot be read ({error}). Download it again.") from error
    raise CheckpointError(
        f"{path}: no tokenizer. Looked for tokenizer.json in it and in {', '.join(_FOLDERS[1:])}. "
        "Give the folder of the text encoder's tokenizer."
    )
