"""Writing files so that a reader never sees half of one.

A file is written under a hidden temporary name in its own folder, flushed to the disk, and renamed
over the final name. A killed process leaves only the temporary file, which the next start of the same
file removes. While a process writes, it holds an advisory lock on the temporary file, so that cleaning
up never takes the work of a run that is still alive.
"""
from __future__ import annotations

import contextlib
import os
import re
import secrets
import time
from pathlib import Path
from typing import IO

try:  # POSIX only; without it a temporary file is simply taken to be stale
    import fcntl
except ImportError:
    fcntl = None

RANDOM_BYTES = 4
ABANDONED_S = 60.0


class BeingWrittenError(OSError):
    """Another process is writing this file right now."""


def user_cache_dir() -> Path:
    """Folder for data that may be lost: $XDG_CACHE_HOME/deep-forcing, else ~/.cache/deep-forcing."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "deep-forcing"


def temp_path(path: Path) -> Path:
    """A fresh temporary name `.<stem>.<random>.tmp<suffix>` beside `path`."""
    return path.with_name(f".{path.stem}.{secrets.token_hex(RANDOM_BYTES)}.tmp{path.suffix}")


def temp_files(path: Path) -> list[Path]:
    """Temporary files that some process made, or is making, for `path`."""
    pattern = re.compile(
        rf"\.{re.escape(path.stem)}\.[0-9a-f]{{{2 * RANDOM_BYTES}}}\.tmp{re.escape(path.suffix)}"
    )
    if not path.parent.is_dir():
        return []
    return sorted(p for p in path.parent.iterdir() if pattern.fullmatch(p.name))


def hold(path: Path) -> IO[bytes] | None:
    """Mark the existing file `path` as being written, until the returned file is closed.

    Returns: the open file that carries the lock; None where the file system knows no locks.
    Raises: BlockingIOError if another process holds it.
    """
    if fcntl is None:
        return None
    file = path.open("rb")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.close()
        raise
    except OSError:  # some network file systems refuse locks
        file.close()
        return None
    return file


def lock_file(path: Path) -> IO[bytes] | None:
    """Make `path` if it is missing and lock it until the returned file is closed or this process ends.

    Returns: None if another process holds it.
    Raises: OSError where the file system knows no locks.
    """
    if fcntl is None:
        raise OSError(f"{path}: this system has no file locks, which workers on one folder need. Use one on POSIX")
    file = path.open("ab")  # open for writing: network file systems lock nothing else
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.close()
        return None
    except BaseException:
        file.close()
        raise
    return file


def remove_stale(path: Path) -> int:
    """Delete what killed runs left for `path`; return how many files went.

    Raises: BeingWrittenError if another process is writing `path` right now.
    """
    removed = 0
    for leftover in temp_files(path):
        try:
            lock = hold(leftover)
        except BlockingIOError as error:
            raise BeingWrittenError(
                f"{path}: another process is writing this file right now (its unfinished file is {leftover.name})"
            ) from error
        except FileNotFoundError:  # finished or cleaned up meanwhile
            continue
        leftover.unlink(missing_ok=True)
        removed += 1
        if lock is not None:
            lock.close()
    return removed


def begin_temporary(path: Path) -> tuple[Path, IO[bytes] | None]:
    """Clean up for `path` and make a temporary file for it that this process holds, see `hold`.

    Another run that cleans up in the moment between takes the file for a killed one's; then all is done once more.
    Raises: BeingWrittenError if another process is writing `path`; OSError.
    """
    while True:
        remove_stale(path)
        temporary = temp_path(path)
        temporary.touch(exist_ok=False)
        with contextlib.suppress(BlockingIOError, FileNotFoundError):
            lock = hold(temporary)
            if temporary.exists():
                return temporary, lock
            if lock is not None:
                lock.close()


def remove_abandoned(folder: Path, suffix: str) -> int:
    """Delete temporary files of this suffix that no process holds, whatever they were for; return how many went.

    One that is seconds old is left alone: its maker may not hold it yet.
    """
    removed, pattern = 0, re.compile(rf"\..+\.[0-9a-f]{{{2 * RANDOM_BYTES}}}\.tmp{re.escape(suffix)}")
    for leftover in [path for path in folder.iterdir() if pattern.fullmatch(path.name)]:
        try:
            if time.time() - leftover.stat().st_mtime < ABANDONED_S:
                continue
            lock = hold(leftover)
        except (BlockingIOError, FileNotFoundError):  # at work, or gone meanwhile
            continue
        leftover.unlink(missing_ok=True)
        removed += 1
        if lock is not None:
            lock.close()
    return removed


def flush_to_disk(path: Path) -> None:
    """fsync a file or a folder, so that a rename cannot outlive the bytes it names."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def move_into_place(temporary: Path, path: Path) -> None:
    """Flush `temporary`, rename it over `path` in the same folder, flush the folder."""
    flush_to_disk(temporary)
    os.replace(temporary, path)
    with contextlib.suppress(OSError):  # not every system lets a folder be flushed
        flush_to_disk(path.parent)


def write_atomically(path: Path, data: bytes) -> None:
    """Write `data` to `path`, whole or not at all. Errors: OSError that names it; the old file then still stands."""
    temporary = temp_path(path)
    try:
        temporary.write_bytes(data)
        move_into_place(temporary, path)
    except BaseException as error:
        temporary.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.errno and error.filename is None:
            error.filename = str(path)  # which a full disk does not say
        raise
