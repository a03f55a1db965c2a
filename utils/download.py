"""Fetch the real weights, and MovieGen's prompts: `python -m utils.download`.

    python -m utils.download                      all weights that inference needs, 17.6 GB
    python -m utils.download --only dit vae       some of them (dit, text, vae; base is the plain Wan model)
    python -m utils.download --only taehv         the tiny decoder of `--decoder taehv`, 23 MB
    python -m utils.download --only clip dino aesthetic   what `python -m evaluation measure` needs for --metrics papers
    python -m utils.download --only longlive      another method's checkpoint (utils/download_sources.py lists them)
    python -m utils.download --prompts            MovieGenVideoBench.txt and its extended version
    python -m utils.download --dry_run            what would be fetched, from where, how large

Every file goes to a hidden `.download` folder beside its place, is checked, and is then renamed: under the
final name there is never half a file. Run the same command again to go on after an interruption.
`.download_lock.json` keeps the SHA-256 of what was fetched, so later runs check without the network.

Where the pins come from: the two hub revisions, TAEHV's commit, sizes and SHA-256 below agree across several
independent public projects that recorded them; every download from the hub is also compared with what the hub
itself states for that revision. The prompt files are pinned by commit only, other methods' checkpoints not at all;
their first download fixes the hash.
"""
from __future__ import annotations

import argparse
import contextlib
import errno
import hashlib
import json
import shutil
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from utils.download_sources import METHOD_FILES, DownloadError, FileInfo, GitHub, HuggingFaceHub, Source
from utils.files import move_into_place, write_atomically
from utils.hashing import sha256_file

WAN, SELF_FORCING, PROMPT_REPO = "Wan-AI/Wan2.1-T2V-1.3B", "gdhe17/Self-Forcing", "guandeh17/Self-Forcing"
TAEHV = "madebyollin/taehv"
CLIP_B, CLIP_L, DINO = "openai/clip-vit-base-patch32", "openai/clip-vit-large-patch14", "facebook/dino-vitb16"
AESTHETIC = "LAION-AI/aesthetic-predictor"
ON_GITHUB = (PROMPT_REPO, TAEHV, AESTHETIC)  # the others are on the Hugging Face hub
REVISIONS = {
    WAN: "37ec512624d61f7aa208f7ea8140a131f93afc9a",
    SELF_FORCING: "2f8b779212da279d212c22a509b66ad6552f350e",
    PROMPT_REPO: "33593df3e81fa3ec10239271dd2c100facac6de1",
    TAEHV: "093b918971d59001a0bad6dfd6e0409b5e1752cf",
    CLIP_B: "3d74acf9a28c67741b2f4f2ea7635f0aaf6f0268",
    CLIP_L: "32bd64288804d66eefd0ccbe215aa642df71cc41",
    DINO: "f205d5d8e640a89a2b8ef0369670dfc37cc07fc2",
    AESTHETIC: "6d122adad522ab246644d9dc1c6d7a3810ee255f",
    **{repo: "main" for _, repo, _, _ in METHOD_FILES},
}
LOCK = ".download_lock.json"
STAGING = ".download"
GROUPS = (
    "dit", "text", "vae", "base", "taehv", "clip", "dino", "aesthetic",
    *dict.fromkeys(group for group, *_ in METHOD_FILES),
)
DEFAULT_GROUPS = ("dit", "text", "vae")
ATTEMPTS = 2  # a corrupt file is fetched once more before giving up
NOTHING_LOST = "Nothing is lost: run the same command again, it goes on where it stopped"


@dataclass(frozen=True)
class RemoteFile:
    """One file: where it is, where it goes (`target`, relative to the folder), and its pinned content."""

    group: str
    repo: str
    path: str
    target: str
    pinned: FileInfo = FileInfo()


def _metric(group: str, repo: str, path: str, size_bytes: int | None, sha256: str) -> RemoteFile:
    folder = repo.rpartition("/")[2]
    return RemoteFile(group, repo, path, f"metric_models/{folder}/{path}", FileInfo(size_bytes, sha256))


def _wan(group: str, path: str, size_bytes: int, sha256: str) -> RemoteFile:
    return RemoteFile(group, WAN, path, f"wan_models/Wan2.1-T2V-1.3B/{path}", FileInfo(size_bytes, sha256))


FILES = (
    RemoteFile(
        "dit",
        SELF_FORCING,
        "checkpoints/self_forcing_dmd.pt",
        "checkpoints/self_forcing_dmd.pt",
        FileInfo(5676252553, "a0413986d9734e02c09504e1520f5697ba6df731bb2f0f35577485e9cc8f56a3"),
    ),
    _wan("dit", "config.json", 249, "ab37994c43740513f94b3ba6233a784035a67b43c8cde83c8f31aa90468c67ce"),
    _wan(
        "text",
        "models_t5_umt5-xxl-enc-bf16.pth",
        11361920418,
        "7cace0da2b446bbbbc57d031ab6cf163a3d59b366da94e5afe36745b746fd81d",
    ),
    _wan(
        "text",
        "google/umt5-xxl/special_tokens_map.json",
        6623,
        "7b8a9f5040adb67b5805abdfd42c1f8d0f3d0e711f10726580eb3789cd0ad61d",
    ),
    _wan(
        "text",
        "google/umt5-xxl/spiece.model",
        4548313,
        "e3909a67b780650b35cf529ac782ad2b6b26e6d1f849d3fbb6a872905f452458",
    ),
    _wan(
        "text",
        "google/umt5-xxl/tokenizer.json",
        16837417,
        "6e197b4d3dbd71da14b4eb255f4fa91c9c1f2068b20a2de2472967ca3d22602b",
    ),
    _wan(
        "text",
        "google/umt5-xxl/tokenizer_config.json",
        61728,
        "ed9a3a8b0faa71a70a32847e0435fe036e6e112d4df4edb7bb48a921e344dc05",
    ),
    _wan("vae", "Wan2.1_VAE.pth", 507609880, "38071ab59bd94681c686fa51d75a1968f64e470262043be31f7a094e442fd981"),
    _wan(
        "base",
        "diffusion_pytorch_model.safetensors",
        5676070424,
        "96b6b242ca1c2f24e9d02cd6596066fab6d310e2d7538f33ae267cb18d957e8f",
    ),
    RemoteFile(
        "taehv",
        TAEHV,
        "taew2_1.pth",
        "wan_models/taew2_1.pth",
        FileInfo(22678901, "d26151e76cdc2c9424bef988de874b33d9a53f30ef3060cd556c429c469c797e"),
    ),
    _metric("clip", CLIP_B, "pytorch_model.bin", 605247071,
            "a63082132ba4f97a80bea76823f544493bffa8082296d62d71581a4feff1576f"),
    _metric("clip", CLIP_B, "config.json", 4186, "b575ef3c36f2a057fa19e221650105052d61cc9c1a972ec15019c6261ec98770"),
    _metric("clip", CLIP_B, "tokenizer.json", 2224041,
            "b556ac8c99757ffb677208af34bc8c6721572114111a6e0aaf5fa69ff0b8d842"),
    _metric("aesthetic", CLIP_L, "model.safetensors", 1710540580,
            "a2bf730a0c7debf160f7a6b50b3aaf3703e7e88ac73de7a314903141db026dcb"),
    _metric("aesthetic", CLIP_L, "config.json", 4519,
            "8a09b467700c58138c29d53c605b34ebc69beaadd13274a8a2af8ad2c2f4032a"),
    _metric("aesthetic", AESTHETIC, "sa_0_4_vit_l_14_linear.pth", 4071,
            "2cd4e60f4f24ae3bcd57b847b13c1f3ba27edc28cc1a7f9ce74ee9f421243cba"),
    _metric("dino", DINO, "pytorch_model.bin", None,
            "a064e36c67289caaa5c949c0b3f7f31a0fcbcba5721f5fa12419933ec1f4fe6e"),
    _metric("dino", DINO, "config.json", 454, "b87c0270b97db085fd82cf114a761fd0f62ae7914fbd407c752a2260646b689c"),
    *(RemoteFile(group, repo, path, target) for group, repo, path, target in METHOD_FILES),
    RemoteFile(
        "prompts", PROMPT_REPO, "prompts/MovieGenVideoBench.txt", "prompts/MovieGenVideoBench.txt"
    ),
    RemoteFile(
        "prompts", PROMPT_REPO, "prompts/MovieGenVideoBench_extended.txt", "prompts/MovieGenVideoBench_extended.txt"
    ),
)


def download(
    files: Sequence[RemoteFile],
    folder: Path,
    *,
    revisions: Mapping[str, str],
    source_of: Callable[[str], Source],
    dry_run: bool = False,
    overwrite: bool = False,
    report: Callable[[str], None] = print,
) -> None:
    """Bring `files` into `folder` at `revisions`, checked; files that are there and right are left alone.

    Args: revisions, by repository; source_of gives the Source of a repository; overwrite replaces files
        that are there but different.
    Raises: DownloadError.
    """
    lock = _read_lock(folder)
    wanted: list[tuple[RemoteFile, FileInfo]] = []
    for file in files:
        revision = revisions[file.repo]
        known = file.pinned if revision == REVISIONS.get(file.repo) else FileInfo()
        entry = lock.get(file.target, {})
        if known == FileInfo() and (entry.get("repo"), entry.get("revision")) == (file.repo, revision):
            known = FileInfo(entry["bytes"], entry["sha256"])
        target = folder / file.target
        if target.exists():
            known = known if known != FileInfo() else source_of(file.repo).info(file.repo, file.path, revision)
            problem = _difference(target, known)
            if problem is None:
                report(f"in place    {target}")
                continue
            if not (overwrite or dry_run):
                raise DownloadError(
                    f"{target} is there, but {problem}. If it is a damaged copy, add --overwrite to fetch it again; "
                    "if it is your own file, move it away or choose another --folder"
                )
        elif dry_run and known == FileInfo():
            known = source_of(file.repo).info(file.repo, file.path, revision)
        wanted.append((file, known))
        if dry_run:
            report(f"would fetch {target} ({_size(known.size_bytes)}) from {file.repo}@{revision[:12]} {file.path}")
    if dry_run:
        report(f"in all {_size(sum(known.size_bytes or 0 for _, known in wanted))} to fetch into {folder}")
        return
    _check_space(folder, wanted)
    for file, known in wanted:
        report(f"fetching    {folder / file.target} ({_size(known.size_bytes)})")
        _fetch(file, known, folder, revisions[file.repo], source_of(file.repo))
    _check_prompts_agree(files, folder)


def _fetch(file: RemoteFile, known: FileInfo, folder: Path, revision: str, source: Source) -> None:
    """Download one file beside its place, check it, rename it, and note it in the lock."""
    target = folder / file.target
    staging = _staging(target)
    try:
        staging.mkdir(parents=True, exist_ok=True)
        stated = source.info(file.repo, file.path, revision)
        expected = _merged(file, known, stated, revision)
        for attempt in range(ATTEMPTS):
            fetched = source.fetch(file.repo, file.path, revision, staging)
            problem = _difference(fetched, expected)
            if problem is None:
                break
            fetched.unlink()
            if attempt == ATTEMPTS - 1:
                raise DownloadError(
                    f"{file.path} from {file.repo}@{revision} arrived damaged {ATTEMPTS} times: {problem}. "
                    f"It was thrown away and {target} is untouched. Try again later or over another network"
                )
        entry = {
            "repo": file.repo,
            "revision": revision,
            "path": file.path,
            "bytes": fetched.stat().st_size,
            "sha256": sha256_file(fetched),
        }
        move_into_place(fetched, target)
        lock = {**_read_lock(folder), file.target: entry}
        write_atomically(folder / LOCK, (json.dumps(lock, indent=2, sort_keys=True) + "\n").encode())
        shutil.rmtree(staging, ignore_errors=True)
        with contextlib.suppress(OSError):  # not empty: other files are still under way
            staging.parent.rmdir()
    except OSError as error:
        raise DownloadError(_disk_message(target, error)) from error


def _staging(target: Path) -> Path:
    """Folder of one file under way; its own, so that finishing one file never drops half of another."""
    return target.parent / STAGING / target.name


def _merged(file: RemoteFile, known: FileInfo, stated: FileInfo, revision: str) -> FileInfo:
    """What the content must be: our pin, which must not contradict what the place itself states."""
    for name in ("size_bytes", "sha256"):
        ours, theirs = getattr(known, name), getattr(stated, name)
        if ours is not None and theirs is not None and ours != theirs:
            raise DownloadError(
                f"{file.repo}@{revision} states {name} {theirs} for {file.path}, but {ours} is pinned. Nothing was "
                f"fetched. If you trust that place, name a revision yourself with --revision {file.repo}=main"
            )
    return FileInfo(
        known.size_bytes if stated.size_bytes is None else stated.size_bytes,
        known.sha256 or stated.sha256,
        stated.git_sha1,
    )


def _difference(path: Path, expected: FileInfo) -> str | None:
    """How the file differs from what is expected; None if it agrees with all that is known."""
    size_bytes = path.stat().st_size
    if expected.size_bytes is not None and size_bytes != expected.size_bytes:
        return f"it has {size_bytes} bytes and {expected.size_bytes} are expected"
    if expected.sha256 is not None:
        digest = sha256_file(path)
        return None if digest == expected.sha256 else f"its SHA-256 is {digest} and {expected.sha256} is expected"
    if expected.git_sha1 is not None:
        digest = hashlib.sha1(b"blob %d\0" % size_bytes + path.read_bytes()).hexdigest()
        return None if digest == expected.git_sha1 else f"its git id is {digest} and {expected.git_sha1} is expected"
    return None


def _check_space(folder: Path, wanted: Sequence[tuple[RemoteFile, FileInfo]]) -> None:
    needed = sum(known.size_bytes or 0 for _, known in wanted)
    for file, _ in wanted:  # less what an earlier run brought
        needed -= sum(p.stat().st_size for p in _staging(folder / file.target).rglob("*") if p.is_file())
    free = _free_bytes(folder)
    if needed > free:
        raise DownloadError(
            f"{folder}: {_size(needed)} are needed and {_size(free)} are free. Make room, choose another --folder, "
            "or fetch part of it with --only"
        )


def _free_bytes(path: Path) -> int:
    """Space on the disk that holds, or would hold, `path`."""
    existing = path.resolve()
    while not existing.exists():
        existing = existing.parent
    return shutil.disk_usage(existing).free


def _disk_message(target: Path, error: OSError) -> str:
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return f"{target}: the disk is full ({_size(_free_bytes(target))} free). Make room. {NOTHING_LOST}"
    return f"{target}: cannot be written: {error.strerror or error}. Check the folder's permissions or use --folder"


def _check_prompts_agree(files: Sequence[RemoteFile], folder: Path) -> None:
    """The prompt files are used line by line, so they must be text of the same number of lines."""
    counts = {}
    for path in (folder / file.target for file in files if file.group == "prompts"):
        try:
            counts[path] = len(path.read_text(encoding="utf-8").rstrip("\n").split("\n"))
        except UnicodeDecodeError as error:
            raise DownloadError(f"{path}: what arrived is not text. Delete it and try again") from error
    if len(set(counts.values())) > 1:
        listed = ", ".join(f"{path.name} {count}" for path, count in counts.items())
        raise DownloadError(f"the prompt files have different numbers of lines ({listed}). Delete them and try again")


def _read_lock(folder: Path) -> dict:
    try:
        lock = json.loads((folder / LOCK).read_bytes())
    except (OSError, ValueError):
        return {}
    return lock if isinstance(lock, dict) else {}


def _size(size_bytes: int | None) -> str:
    if size_bytes is None:
        return "size unknown"
    for unit, scale in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if size_bytes >= scale:
            return f"{size_bytes / scale:.1f} {unit}"
    return f"{size_bytes} bytes"


def _revisions(overrides: Sequence[str]) -> dict[str, str]:
    revisions = dict(REVISIONS)
    for override in overrides:
        repo, equals, revision = override.partition("=")
        if repo not in revisions or not equals or not revision:
            raise DownloadError(
                f"--revision {override!r} is not REPO=REVISION with a known repository. Known: {', '.join(revisions)}"
            )
        revisions[repo] = revision
    return revisions


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m utils.download", description="Fetch weights and prompts, checked.")
    parser.add_argument("--only", nargs="+", choices=GROUPS, metavar="GROUP", help=", ".join(GROUPS))
    parser.add_argument("--prompts", action="store_true", help="fetch MovieGen's prompts (alone: nothing else)")
    parser.add_argument("--folder", type=Path, default=Path("."), help="root of wan_models/, checkpoints/, prompts/")
    parser.add_argument("--revision", action="append", default=[], metavar="REPO=REV", help="another revision")
    parser.add_argument("--overwrite", action="store_true", help="replace files that are there but different")
    parser.add_argument("--dry_run", action="store_true", help="list files and sizes, fetch nothing")
    return parser


def source_of_repo(repo: str) -> Source:
    """Where a repository lives."""
    return GitHub() if repo in ON_GITHUB else HuggingFaceHub()


def main(argv: Sequence[str] | None = None, *, source_of: Callable[[str], Source] = source_of_repo) -> int:
    """Command line; returns the exit status (130 when interrupted)."""
    options = _parser().parse_args(argv)
    groups = tuple(options.only or (() if options.prompts else DEFAULT_GROUPS))
    groups += ("prompts",) if options.prompts else ()
    try:
        download(
            [file for file in FILES if file.group in groups],
            options.folder,
            revisions=_revisions(options.revision),
            source_of=source_of,
            dry_run=options.dry_run,
            overwrite=options.overwrite,
        )
    except DownloadError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"stopped. {NOTHING_LOST}", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
