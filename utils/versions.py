"""Which versions made a number."""
from __future__ import annotations

import platform
from collections.abc import Iterable
from contextlib import suppress
from importlib import metadata


def installed_versions(packages: Iterable[str]) -> dict[str, str]:
    """Python's version and those of the packages that are installed."""
    versions = {"python": platform.python_version()}
    for name in packages:
        with suppress(metadata.PackageNotFoundError):  # one that lies on the path without being installed
            versions[name] = metadata.version(name)
    return versions
