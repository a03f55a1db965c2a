"""Lengthen short prompts with a local chat model, line by line.

    python -m utils.extend_prompts --input short.txt --output long.txt --model Qwen/Qwen2.5-7B-Instruct

Video models of this family were trained on long, detailed prompts and do visibly better with them. Line n
of the output belongs to line n of the input (a blank line stays blank), so the two go together as
--data_path short.txt --extended_prompt_path long.txt. Every answer is kept in a cache under the SHA-256 of
model, instruction and prompt: after an interruption the same command goes on where it stopped, and the
output file appears at the end, whole. Decoding is greedy.
"""
from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from tqdm import tqdm

from utils.files import user_cache_dir, write_atomically
from utils.hashing import fingerprint
from utils.prompts import PromptError, read_text_lines

DEFAULT_MODEL = "Qwen/Qwen2.5-7B-Instruct"  # as the Self Forcing and Deep Forcing papers did
BATCH = 8
MAX_NEW_TOKENS = 320  # 120 words need about 170; the rest is room for models that count badly
INSTRUCTION = """You turn a short description of a video into one detailed paragraph for a video generator.
Rules:
- Write one paragraph in English, 80 to 120 words, and nothing else: no title, no list, no quotation marks, no remark.
- Keep every fact of the description: each person, animal, object, number, colour, place, style and action in it.
- Add what fits and can be seen: first the subject and its look, then the setting, the motion, the camera, the light.
- Describe one continuous shot with steady motion that can go on for a minute. No cuts, no dialogue, no on-screen text.
- Use plain, concrete words in the present tense."""

Generate = Callable[[list[str]], list[str]]  # prompts -> the model's answers, in order


class ExtendError(RuntimeError):
    """A prompt could not be lengthened; the message says which and what to do."""


def extend(
    lines: Sequence[str], *, model: str, load: Callable[[], Generate], cache_folder: Path, batch: int = BATCH
) -> list[str]:
    """Lengthen every line; blank lines stay blank.

    Args: model, its name for the cache; load returns the generate function and is only called when an
        answer is missing; cache_folder keeps one small file per answer; batch, prompts per generate call.
    Returns: as many lines as came in, none with a line break.
    Raises: ExtendError if the model gives nothing usable; what was answered before is in the cache.
    """
    if batch < 1:
        raise ExtendError(f"--batch {batch}: at least 1 prompt at a time is needed")
    answers = {line: _read(cache_folder, model, line) for line in dict.fromkeys(lines) if line}
    missing = [line for line, answer in answers.items() if answer is None]
    generate = load() if missing else None
    with tqdm(total=len(missing), desc="extending", unit="prompt", disable=not missing) as bar:
        for start in range(0, len(missing), batch):
            asked = missing[start : start + batch]
            replies = generate(asked)
            if len(replies) != len(asked):
                raise ExtendError(f"{model} gave {len(replies)} answers to {len(asked)} prompts. Try --batch 1")
            for line, reply in zip(asked, replies, strict=True):
                answers[line] = _one_paragraph(reply)
                if not answers[line]:
                    raise ExtendError(f"{model} gave no text for the prompt {line!r}. Reword it, or change --model")
                _write(cache_folder, model, line, answers[line])
            bar.update(len(asked))
    return [answers[line] if line else "" for line in lines]


def _one_paragraph(reply: str) -> str:
    """The answer on one line, without thinking aloud and without quotation marks around it."""
    reply = re.sub(r"<think>.*?(</think>|\Z)", " ", reply, flags=re.DOTALL)
    text = " ".join(reply.split())
    if len(text) > 1 and (text[0], text[-1]) in {('"', '"'), ("'", "'"), ("“", "”")}:
        text = text[1:-1].strip()
    return text


def _whole_sentences(text: str) -> str:
    """`text` up to its last full stop; all of it if there is none."""
    sentences = re.match(r".*[.!?](?=\s|$)", text, flags=re.DOTALL)
    return sentences.group() if sentences else text


def _entry(folder: Path, model: str, prompt: str) -> Path:
    return folder / f"{fingerprint([model, INSTRUCTION, prompt])}.json"


def _read(folder: Path, model: str, prompt: str) -> str | None:
    try:
        answer = json.loads(_entry(folder, model, prompt).read_bytes())["extended"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return answer if isinstance(answer, str) and answer else None


def _write(folder: Path, model: str, prompt: str, answer: str) -> None:
    record = {"model": model, "prompt": prompt, "extended": answer}
    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(_entry(folder, model, prompt), json.dumps(record, indent=2, ensure_ascii=False).encode())


def load_chat_model(name: str, *, device: str | None, revision: str | None) -> Generate:
    """A chat model through transformers, on `device` (None: GPU if there is one), answering greedily.

    Raises: ExtendError if it cannot be loaded or has no chat template.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        tokenizer = AutoTokenizer.from_pretrained(name, revision=revision, padding_side="left")
        model = AutoModelForCausalLM.from_pretrained(name, revision=revision, dtype="auto").to(device).eval()
    except (OSError, ValueError) as error:
        raise ExtendError(
            f"--model {name} cannot be loaded: {str(error).strip().splitlines()[0]} Give the name of a chat model on "
            "the hub, or a folder that holds one (`hf download NAME --local-dir FOLDER`)"
        ) from error
    if tokenizer.chat_template is None:
        raise ExtendError(f"--model {name} has no chat template. Choose an instruct or chat model")
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    stops = model.generation_config.eos_token_id
    stops = [tokenizer.eos_token_id] if stops is None else [stops] if isinstance(stops, int) else list(stops)

    def generate(prompts: list[str]) -> list[str]:
        chats = [
            tokenizer.apply_chat_template(
                [{"role": "system", "content": INSTRUCTION}, {"role": "user", "content": prompt}],
                tokenize=False,
                add_generation_prompt=True,
            )
            for prompt in prompts
        ]
        inputs = tokenizer(chats, return_tensors="pt", padding=True, add_special_tokens=False).to(device)
        with torch.inference_mode():
            tokens = model.generate(
                input_ids=inputs["input_ids"],
                attention_mask=inputs["attention_mask"],
                max_new_tokens=MAX_NEW_TOKENS,
                do_sample=False,
                temperature=None,
                top_p=None,
                top_k=None,
                pad_token_id=tokenizer.pad_token_id,
            )
        answers = tokens[:, inputs["input_ids"].shape[1] :]
        texts = tokenizer.batch_decode(answers, skip_special_tokens=True)
        stopped = torch.isin(answers, torch.tensor(stops, device=device)).any(dim=1).tolist()
        return [text if done else _whole_sentences(text) for text, done in zip(texts, stopped, strict=True)]

    return generate


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m utils.extend_prompts", description="Lengthen prompts.")
    parser.add_argument("--input", type=Path, required=True, help="text file, one prompt a line")
    parser.add_argument("--output", type=Path, required=True, help="text file to write, line-aligned with --input")
    parser.add_argument("--model", default=DEFAULT_MODEL, help="chat model: a hub name or a folder")
    parser.add_argument("--revision", help="revision of a hub model")
    parser.add_argument("--device", help="for example cuda or cpu (default: a GPU if there is one)")
    parser.add_argument("--batch", type=int, default=BATCH, help="prompts at a time")
    parser.add_argument("--cache_folder", type=Path, default=None, help="where answers are kept")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Command line; returns the exit status (130 when interrupted)."""
    options = _parser().parse_args(argv)
    name = options.model if options.revision is None else f"{options.model}@{options.revision}"
    try:
        if options.output.exists() and options.output.samefile(options.input):
            raise ExtendError(f"--output {options.output} is the input file. Give another name")
        if not options.output.parent.is_dir():
            raise ExtendError(f"--output {options.output}: there is no folder {options.output.parent}. Make it first")
        lines = extend(
            read_text_lines(options.input),
            model=name,
            load=lambda: load_chat_model(options.model, device=options.device, revision=options.revision),
            cache_folder=options.cache_folder or user_cache_dir() / "extended_prompts",
            batch=options.batch,
        )
        write_atomically(options.output, ("\n".join(lines) + "\n").encode("utf-8"))
    except (PromptError, ExtendError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except OSError as error:
        print(f"error: {options.output} or the cache cannot be written: {error}. Make room there", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("stopped. Answers so far are kept: run the same command again", file=sys.stderr)
        return 130
    print(f"wrote {sum(bool(line) for line in lines)} prompts to {options.output}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
