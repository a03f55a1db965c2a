"""Make videos from prompts: read the config, build, stream each video into its file.

    python inference.py --config_path configs/deep_forcing.yaml --prompt "..." --seconds 60

Exit status: 0 all videos are there, 1 some failed (listed at the end), 2 bad input, 130 interrupted.
"""
from __future__ import annotations

import argparse
import logging
import sys
from pathlib import Path

import wan.kv_cache.policies  # noqa: F401  (registers every policy)
from pipeline.build import choose_device, describe, plan_run
from pipeline.engine import Engine
from pipeline.render import LengthRequest, make_jobs, pending_jobs, render
from utils.config import ConfigError, load_config
from utils.launch import read_launch
from utils.outputs import OutputFolder
from utils.prompts import PromptError, load_prompts, shard
from wan.checkpoint import CheckpointError
from wan.kv_cache.policy import build_policy, policy_fields

logger = logging.getLogger("inference")

DEFAULT_FRAMES = 126
DEFAULT_SEED = 1356145


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line; names are those that sibling projects use."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--config_path", type=Path, default=Path("configs/deep_forcing.yaml"), help="method: a YAML of configs/")
    add("--prompt", help="one prompt, instead of --data_path")
    add("--data_path", type=Path, help="prompts: .txt (one a line), .jsonl, or a folder (default: the model's own)")
    add("--extended_prompt_path", type=Path, help="longer prompts, line by line; the short ones name the files")
    add("--output_folder", type=Path, default=Path("videos"), help="where videos and their records go")
    add("--checkpoint_path", type=Path, help="transformer weights, any known layout (default: the model's own)")
    add("--use_ema", action="store_true", help="take the averaged weights of a .pt checkpoint")
    length = parser.add_mutually_exclusive_group()
    length.add_argument("--num_output_frames", type=int, default=DEFAULT_FRAMES, help="length in latent frames (default %(default)s)")
    length.add_argument("--seconds", type=float, help="length in seconds, instead of latent frames")
    add("--seed", type=int, default=DEFAULT_SEED, help="every prompt starts from it afresh (default %(default)s)")
    add("--num_samples", type=int, default=1, help="videos per prompt")
    add("--batch_size", type=int, default=1, help="videos made side by side")
    add("--save_with_index", action="store_true", help="name files by line number instead of by prompt")
    add("--i2v", action="store_true", help="continue the image or video that belongs to each prompt")
    add("--policy", help="replace the config's cache policy")
    add("--is_ds_only", type=int, choices=(0, 1), default=0, help="1: Deep Sink without Participative Compression")
    add("--Budget", type=int, dest="budget", help="latent frames kept by pruning")
    add("--Recent", type=int, dest="recent", help="newest latent frames kept by pruning, the chunk included")
    add("--set", nargs="+", action="extend", default=[], metavar="KEY=VALUE", help="override a key of the config")
    add("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    add("--overwrite", action="store_true", help="redo finished videos (default: skip them)")
    add("--dry_run", action="store_true", help="print what would be done and stop")
    add("--random_weights", action="store_true", help="seeded random networks, for benchmarks")
    add("--verbose", action="store_true", help="full traces of failures")
    options = parser.parse_args(arguments)
    for name in ("num_samples", "batch_size"):
        if getattr(options, name) < 1:
            parser.error(f"--{name} {getattr(options, name)} must be at least 1")
    if options.seed < 0:
        parser.error(f"--seed {options.seed} must be 0 or more")
    return options


def run(options: argparse.Namespace) -> int:
    """Check everything, then load, then make the videos; returns the exit status."""
    launch = read_launch()
    config = load_config(
        options.config_path, policy_fields=policy_fields(), build_policy=build_policy, overrides=options.set, policy=options.policy,
        is_ds_only=bool(options.is_ds_only), budget=options.budget, recent=options.recent,
    )
    plan = plan_run(
        config, checkpoint=options.checkpoint_path, use_ema=options.use_ema,
        device=choose_device(options.device, launch.local_rank), random_weights=options.random_weights,
    )
    length = LengthRequest(options.num_output_frames, options.seconds)
    resolved = length.resolve(plan)
    data_path = options.data_path
    if data_path is None and options.prompt is None:
        data_path = plan.spec.prompts
        logger.info("no prompt given: showing %s", data_path)
    items = load_prompts(
        prompt=options.prompt, data_path=data_path, extended_prompt_path=options.extended_prompt_path, i2v=options.i2v,
    )
    if options.dry_run:
        print(describe(plan, resolved, options.batch_size))
        print(f"prompts   {len(items)} x {options.num_samples} samples -> {options.output_folder}")
        return 0
    folder = OutputFolder(options.output_folder, overwrite=options.overwrite)
    jobs = make_jobs(plan, items, length, seed=options.seed, num_samples=options.num_samples, with_index=options.save_with_index)
    jobs = pending_jobs(folder, shard(jobs, launch.rank, launch.world_size))
    if not jobs:
        return 0
    engine = Engine(plan)
    engine.prepare([job.item.text for job in jobs])
    summary = render(engine, folder, jobs, length, batch_size=options.batch_size)
    logger.info("%d videos finished in %s", len(summary.finished), folder.folder)
    for stem, reason in summary.failed.items():
        logger.error("failed: %s: %s", stem, reason)
    return summary.exit_status


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; bad input is one line on stderr and exit status 2."""
    options = parse_arguments(arguments)
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    logging.getLogger("pipeline").setLevel(logging.DEBUG if options.verbose else logging.INFO)
    for noisy in ("httpx", "transformers", "diffusers", "huggingface_hub"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
    try:
        return run(options)
    except (ConfigError, PromptError, CheckpointError, OSError) as error:
        if options.verbose:
            raise
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted before anything was made", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
