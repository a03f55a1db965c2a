"""The places that files come from: the Hugging Face hub, GitHub (small files outside LFS), and what lies where."""
from __future__ import annotations

import errno
import http.client
import urllib.error
import urllib.request
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EACCES, errno.EPERM, errno.EROFS)
TIMEOUT_S = 30
BLOCK_BYTES = 1 << 16
LFS_POINTER = b"version https://git-lfs"
OFFLINE = (
    "Check the connection (and HTTPS_PROXY, HF_ENDPOINT, HF_HUB_OFFLINE), then run the same command again: it goes "
    "on where it stopped. Without a connection here, fetch the files elsewhere and copy the folders over"
)


# Checkpoints of other methods that share the architecture: (group, repository on the hub, path there, place here).
# No revision is pinned: `main` of the day is compared with what the hub states, and the lock keeps its hash.
METHOD_FILES = (
    ("longlive", "Efficient-Large-Model/LongLive-1.3B", "models/longlive_base.pt",
     "checkpoints/longlive/longlive_base.pt"),
    ("longlive", "Efficient-Large-Model/LongLive-1.3B", "models/lora.pt", "checkpoints/longlive/lora.pt"),
    ("rolling_forcing", "TencentARC/RollingForcing", "checkpoints/rolling_forcing_dmd.pt",
     "checkpoints/rolling_forcing_dmd.pt"),
    ("causvid", "tianweiy/CausVid", "autoregressive_checkpoint/model.pt", "checkpoints/causvid_autoregressive.pt"),
    ("causal_forcing", "zhuhz22/Causal-Forcing", "chunkwise/causal_forcing.pt",
     "checkpoints/causal_forcing_chunkwise.pt"),
    ("causal_forcing_framewise", "zhuhz22/Causal-Forcing", "framewise/causal_forcing.pt",
     "checkpoints/causal_forcing_framewise.pt"),
    ("causal_forcing_longvideo", "zhuhz22/Causal-Forcing", "chunkwise/longvideo.pt",
     "checkpoints/causal_forcing_longvideo.pt"),
    ("reward_forcing", "JaydenLu666/Reward-Forcing-T2V-1.3B", "rewardforcing.pt", "checkpoints/rewardforcing.pt"),
    ("infinite_forcing", "johnrobinsn/Infinite-Forcing", "ema_model.pt", "checkpoints/infinite_forcing_ema.pt"),
)


class DownloadError(RuntimeError):
    """A file could not be fetched or is not the one that was pinned; the message says what to do."""


@dataclass(frozen=True)
class FileInfo:
    """What is known of a file's content. git_sha1 is the blob id of files outside LFS."""

    size_bytes: int | None = None
    sha256: str | None = None
    git_sha1: str | None = None


class Source(Protocol):
    """A place that holds repositories. Both methods raise DownloadError, or OSError for the local disk."""

    def info(self, repo: str, path: str, revision: str) -> FileInfo:
        """What the place states about the file."""

    def fetch(self, repo: str, path: str, revision: str, folder: Path) -> Path:
        """Download into `folder`, going on from an earlier part; return where the file lies."""


class HuggingFaceHub:
    """The hub through huggingface_hub, which resumes and honours HF_ENDPOINT and HF_TOKEN."""

    def info(self, repo: str, path: str, revision: str) -> FileInfo:
        from huggingface_hub import HfApi  # slow to import, and not needed to list or verify files

        try:
            found = HfApi().get_paths_info(repo, [path], revision=revision)
        except Exception as error:  # every HTTP library that the hub client has used brings its own
            raise _told(error, f"asking the hub for {repo}@{revision} {path}") from error
        if not found:
            raise DownloadError(f"{repo}@{revision} has no file {path}. Choose another --revision {repo}=REV")
        size_bytes, lfs = found[0].size, found[0].lfs
        return FileInfo(size_bytes, git_sha1=found[0].blob_id) if lfs is None else FileInfo(size_bytes, lfs["sha256"])

    def fetch(self, repo: str, path: str, revision: str, folder: Path) -> Path:
        from huggingface_hub import hf_hub_download

        try:
            return Path(hf_hub_download(repo, path, revision=revision, local_dir=folder))
        except Exception as error:
            raise _told(error, f"fetching {path} from {repo}@{revision}") from error


def _told(error: Exception, doing: str) -> Exception:
    """Disk errors as OSError; anything else as DownloadError with the remedy that fits."""
    if isinstance(error, OSError) and error.errno in DISK_ERRORS:
        return error
    if "No space left on device" in str(error):
        return OSError(errno.ENOSPC, "No space left on device")
    kind, first_line = type(error).__name__, (str(error).strip().splitlines() or [""])[0].rstrip(".")
    remedy = OFFLINE
    if kind in ("RepositoryNotFoundError", "GatedRepoError", "RevisionNotFoundError", "RemoteEntryNotFoundError"):
        remedy = "Check --revision; for a gated repository, log in with `hf auth login`"
    return DownloadError(f"{doing} failed: {kind}: {first_line}. {remedy}")


class GitHub:
    """Raw files of a public GitHub repository, resumed with HTTP ranges."""

    def __init__(self, base: str = "https://raw.githubusercontent.com"):
        self.base = base

    def info(self, repo: str, path: str, revision: str) -> FileInfo:
        """Nothing is stated beside the content itself, which the commit already pins."""
        return FileInfo()

    def fetch(self, repo: str, path: str, revision: str, folder: Path) -> Path:
        name = path.rsplit("/", 1)[-1]
        part = folder / f"{name}.{revision[:12]}.part"
        url = f"{self.base}/{repo}/{revision}/{path}"
        try:
            self._fetch_rest(url, part)
        except urllib.error.HTTPError as error:
            remedy = f"Choose another revision, for example --revision {repo}=main" if error.code == 404 else OFFLINE
            raise DownloadError(f"{url}: HTTP {error.code} {error.reason}. {remedy}") from error
        except OSError as error:
            if error.errno in DISK_ERRORS:
                raise
            raise DownloadError(f"{url} cannot be reached: {error}. {OFFLINE}") from error
        except http.client.HTTPException as error:
            raise DownloadError(f"{url}: the connection broke: {type(error).__name__}. {OFFLINE}") from error
        with part.open("rb") as file:
            if file.read(len(LFS_POINTER)) == LFS_POINTER:
                part.unlink()
                raise DownloadError(f"{url} is only a pointer into Git LFS. Choose another --revision {repo}=REV")
        return part.rename(folder / name)

    def _fetch_rest(self, url: str, part: Path) -> None:
        """Append what is missing of `part`; start over where the server does not resume."""
        have = part.stat().st_size if part.exists() else 0
        headers = {"User-Agent": "deep-forcing"} | ({"Range": f"bytes={have}-"} if have else {})
        try:
            response = urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=TIMEOUT_S)
        except urllib.error.HTTPError as error:
            if error.code != http.client.REQUESTED_RANGE_NOT_SATISFIABLE:
                raise
            part.unlink()  # as long as the file, or longer: not known to be whole, so start over
            self._fetch_rest(url, part)
            return
        with response:
            resumed = response.status == http.client.PARTIAL_CONTENT
            length = response.headers.get("Content-Length")
            with part.open("ab" if resumed else "wb") as file:
                while block := response.read(BLOCK_BYTES):
                    file.write(block)
        total = None if length is None else int(length) + (have if resumed else 0)
        if total is not None and part.stat().st_size != total:
            raise http.client.IncompleteRead(b"", total - part.stat().st_size)
