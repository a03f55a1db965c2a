"""SHA-256 of texts, files and settings.

Hashing a checkpoint of several gigabytes takes seconds, so the hash of a file is remembered on disk by
its real path, size and modification time. The memory may be lost or deleted at any time.
"""
from __future__ import annotations

import hashlib
import json
from pathlib import Path

from utils.files import user_cache_dir, write_atomically


def sha256_text(text: str) -> str:
    """Hex SHA-256 of the UTF-8 bytes of `text`."""
    return hashlib.sha256(text.encode("utf-8")).hexdigest()


def sha256_file(path: Path) -> str:
    """Hex SHA-256 of a file's bytes, remembered by (real path, size, modification time in ns).

    Raises: OSError if the file cannot be read. An unwritable cache folder only costs time.
    """
    path = Path(path)
    real = path.resolve(strict=True)
    stat = real.stat()
    key = {"path": str(real), "bytes": stat.st_size, "mtime_ns": stat.st_mtime_ns}
    memory = user_cache_dir() / "sha256" / f"{sha256_text(str(real))[:32]}.json"
    remembered = _read_memory(memory)
    if all(remembered.get(name) == value for name, value in key.items()) and "sha256" in remembered:
        return remembered["sha256"]
    with real.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    try:
        memory.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(memory, json.dumps({**key, "sha256": digest}).encode())
    except OSError:
        pass  # only a speed-up
    return digest


def content_hash(path: Path) -> str:
    """SHA-256 of a file, or of all files of a folder under their names."""
    if path.is_file():
        return sha256_file(path)
    files = sorted(file for file in path.rglob("*") if file.is_file() and not file.name.startswith("."))
    return fingerprint({file.relative_to(path).as_posix(): sha256_file(file) for file in files})


def _read_memory(memory: Path) -> dict:
    try:
        remembered = json.loads(memory.read_bytes())
    except (OSError, ValueError):
        return {}
    return remembered if isinstance(remembered, dict) else {}


def fingerprint(settings: object) -> str:
    """Hex SHA-256 of a JSON-able value; equal values give equal fingerprints whatever the key order.

    Raises: TypeError for values JSON has no form for, ValueError for nan and infinity.
    """
    text = json.dumps(settings, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False)
    return sha256_text(text)
