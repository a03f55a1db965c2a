"""Make videos from prompts: read the config, build, stream each video into its file.

    python inference.py --config_path configs/deep_forcing.yaml --prompt "..." --seconds 60

Exit status: 0 all videos are there, 1 some failed (listed at the end), 2 bad input, 130 interrupted.
"""
from __future__ import annotations

import signal

if __name__ == "__main__":  # the imports below take seconds: Ctrl-C ends them at once, without a trace
    at_interrupt = signal.getsignal(signal.SIGINT)
    if at_interrupt is signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)

import argparse
import logging
import sys
from pathlib import Path
from typing import NoReturn

import torch

from pipeline.acceleration import MODES
from pipeline.build import RunPlan, plan_run
from pipeline.decoder import NAMES as DECODERS
from pipeline.engine import Engine, warn_of_words
from pipeline.length import asked_pixel_frames, check_timelines, video_length
from pipeline.memory import fit_memory
from pipeline.preflight import describe
from pipeline.presets import NAMES as PRESETS
from pipeline.render import Summary, check_number, make_jobs, pending_jobs, refuse_other_settings, render
from utils.config import load_config
from utils.config_schema import nearest
from utils.devices import choose_device, choose_vae_device
from utils.launch import Launch, read_launch, wait_for_others
from utils.outputs import OutputFolder, check_writable, reason
from utils.prompts import VIDEO_SUFFIXES, PromptItem, load_prompts, shard
from wan.backends import NAMES as BACKENDS
from wan.kv_cache.policy import build_policy, policy_fields

logger = logging.getLogger("inference")

DEFAULT_CONFIG = Path(__file__).resolve().parent / "configs" / "deep_forcing.yaml"
DEFAULT_FRAMES = 126
DEFAULT_SEED = 1356145


class _Parser(argparse.ArgumentParser):
    """A parser whose errors are one line, as all others are."""

    def error(self, message: str) -> NoReturn:
        _, unknown, words = message.partition("unrecognized arguments: ")
        hint = nearest(words.split()[0], self._option_string_actions) if unknown else ""
        self.exit(2, f"error: {message}.{hint} --help lists every flag\n")


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line; names are those that sibling projects use."""
    parser = _Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--config_path", type=Path, default=DEFAULT_CONFIG, help="method: a YAML (default: configs/deep_forcing.yaml)")
    add("--prompt", help="one prompt, instead of --data_path")
    add("--data_path", type=Path, help="prompts: .txt (one a line), .jsonl, .yaml or a folder (default: the model's)")
    add("--extended_prompt_path", type=Path, help="longer prompts, line by line; the short ones name the files")
    add("--output_folder", type=Path, default=Path("videos"), help="where videos and their records go")
    add("--checkpoint_path", type=Path, help="transformer weights, any known layout (default: the model's own)")
    add("--lora_path", type=Path, help="a LoRA that is merged into the transformer (default: the model's own, if any)")
    add("--lora_alpha", type=float, help="scales it, over its rank (default: its rank, a scale of 1)")
    add("--decoder", choices=DECODERS, default="wan", help="wan (the VAE), or a tiny, approximate one")
    add("--decoder_path", type=Path, help="weights of the tiny decoder (default: where the model's YAML says)")
    add("--use_ema", action="store_true", help="take the averaged weights of a .pt checkpoint")
    length = parser.add_mutually_exclusive_group()
    length.add_argument(
        "--num_output_frames", type=int, default=DEFAULT_FRAMES, help="length in latent frames (default %(default)s)"
    )
    length.add_argument("--seconds", type=float, help="length in seconds, instead of latent frames")
    add("--seed", type=_whole(0), default=DEFAULT_SEED, help="every prompt starts from it afresh (default %(default)s)")
    add("--num_samples", type=_whole(1), default=1, help="videos per prompt")
    add("--batch_size", type=_whole(1), default=1, help="videos made side by side")
    add("--save_with_index", action="store_true", help="name files by line number instead of by prompt")
    add("--i2v", action="store_true", help="continue the image or video that belongs to each prompt")
    add("--policy", help="another cache policy: anchored, full, packforcing, participative, rolling or sink")
    add("--is_ds_only", type=int, choices=(0, 1), default=0, help="1: Deep Sink without Participative Compression")
    add("--Budget", type=int, dest="budget", help="latent frames kept by pruning")
    add("--Recent", type=int, dest="recent", help="newest latent frames kept by pruning, the chunk included")
    add("--set", nargs="+", action="extend", default=[], metavar="KEY=VALUE", help="override a key of the config")
    add("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    add("--vae_device", default="auto", help="where the VAE works, such as cuda:1 (default: as --device)")
    add("--attention", choices=BACKENDS, default="auto", help="attention kernel (default: the fastest that is there)")
    add("--acceleration", choices=tuple(MODES), default="exact",
        help="on a GPU: exact: compiled parts and CUDA graphs, the same results; fp8: that, and linear layers and "
        "attention in 8-bit floats, approximate; eager: plain passes (default %(default)s)")
    add("--memory", choices=PRESETS, default="auto", help="what lives where (default: the fastest that fits)")
    add("--overwrite", action="store_true", help="redo finished videos (default: skip them)")
    add("--dry_run", action="store_true", help="print what would be done and stop")
    add("--random_weights", action="store_true", help="seeded random networks, for benchmarks")
    add("--verbose", action="store_true", help="full traces of failures")
    return parser.parse_args(arguments)


def _whole(least: int):
    """An argument type: a whole number, at least `least`."""

    def read(text: str) -> int:
        try:
            number = int(text)
        except ValueError:
            number = least - 1
        if number < least:
            raise argparse.ArgumentTypeError(f"{text!r} must be a whole number of at least {least}")
        return number

    return read


def make_plan(options: argparse.Namespace, launch: Launch) -> RunPlan:
    """The run as config and flags decide it."""
    config = load_config(
        options.config_path, policy_fields=policy_fields(), build_policy=build_policy, overrides=options.set,
        policy=options.policy, is_ds_only=bool(options.is_ds_only), budget=options.budget, recent=options.recent,
    )
    device = choose_device(options.device, launch.local_rank)
    return plan_run(
        config, checkpoint=options.checkpoint_path, use_ema=options.use_ema,
        device=device, vae_device=choose_vae_device(options.vae_device, device), random_weights=options.random_weights,
        decoder=options.decoder, decoder_path=options.decoder_path,
        lora=options.lora_path, lora_alpha=options.lora_alpha,
        acceleration=MODES[options.acceleration](attention=options.attention),
    )


def read_prompts(options: argparse.Namespace, plan: RunPlan) -> list[PromptItem]:
    """What to show: the prompts given, or else those that come with the model."""
    data_path = options.data_path
    if data_path is None and options.prompt is None:
        data_path = plan.spec.prompts
        logger.info("no prompt given: showing %s", data_path)
    return load_prompts(
        prompt=options.prompt, data_path=data_path, extended_prompt_path=options.extended_prompt_path, i2v=options.i2v,
    )


def run(options: argparse.Namespace) -> int:
    """Check everything, then load, then make the videos; returns the exit status."""
    launch = read_launch()
    plan = make_plan(options, launch)
    if plan.policy.notice:
        logger.warning("%s", plan.policy.notice)
    pixel_frames = asked_pixel_frames(plan, latent_frames=options.num_output_frames, seconds=options.seconds)
    items = read_prompts(options, plan)
    length = video_length(plan, pixel_frames, given_frames=1 if options.i2v else 0)  # a source is one frame at least
    check_timelines(plan, items, length, given_frames=1 if options.i2v else 0)
    plan = fit_memory(plan, options.memory, options.batch_size)
    check_number(len(items), options.num_samples)
    if options.dry_run:
        check_writable(options.output_folder)
        warn_of_words(plan, [text for item in items for text in item.texts])
        print(describe(plan, length, options.batch_size))
        if any(item.source is not None and item.source.suffix.lower() in VIDEO_SUFFIXES for item in items):
            print("sources   taken for one frame here; videos are read when they are continued")
        print(f"prompts   {len(items)} x {options.num_samples} samples -> {options.output_folder}")
        return 0
    folder = OutputFolder(options.output_folder, overwrite=options.overwrite)
    jobs = make_jobs(
        plan, items, pixel_frames, seed=options.seed, num_samples=options.num_samples,
        with_index=options.save_with_index,
    )
    refuse_other_settings(folder, jobs)
    jobs = pending_jobs(folder, shard(jobs, launch.rank, launch.world_size))
    summary = Summary()
    if jobs:
        engine = Engine(plan)
        engine.prepare([text for job in jobs for text in job.item.texts])
        summary = render(engine, folder, jobs, pixel_frames, batch_size=options.batch_size)
        others = len(summary.elsewhere)
        logger.info(
            "finished %d of %d videos in %s%s", len(summary.finished), len(jobs), folder.folder,
            f"; {others} {'was' if others == 1 else 'were'} made by another run" if others else "",
        )
    for stem, why in summary.failed.items():
        logger.error("failed: %s: %s", stem, why)
    for stem, why in summary.unlisted.items():
        logger.error("not listed: %s: %s", stem, why)
    if not summary.interrupted:
        wait_for_others(launch, failed=summary.exit_status != 0)
    return summary.exit_status


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; bad input is an error on stderr and exit status 2."""
    options = parse_arguments(arguments)
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    logging.getLogger("pipeline").setLevel(logging.DEBUG if options.verbose else logging.INFO)
    for noisy in ("httpx", "transformers", "diffusers", "huggingface_hub"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
    try:
        return run(options)
    except (ValueError, OSError, torch.OutOfMemoryError) as error:  # every error class of this project is a ValueError
        if options.verbose:
            raise
        print(f"error: {reason(error)}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted at once; finished videos are kept, and the same command goes on from there", file=sys.stderr)
        return 130


if __name__ == "__main__":
    signal.signal(signal.SIGINT, at_interrupt)
    sys.exit(main())
