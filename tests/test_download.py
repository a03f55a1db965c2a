"""Laws of downloading: only whole, checked files get their final name, and every failure says what to do."""
from __future__ import annotations

import errno
import hashlib
import http.server
import json
import os
import re
import threading
from collections import Counter
from pathlib import Path

import pytest

from utils import download as module
from utils.download import DEFAULT_GROUPS, FILES, LOCK, REVISIONS, SELF_FORCING, WAN, RemoteFile, download, main
from utils.download_sources import METHOD_FILES, DownloadError, FileInfo, GitHub, HuggingFaceHub, _told

CONTENT = {"config.json": b"{}", "vae.pth": b"v" * 5000, "google/umt5-xxl/tokenizer.json": b"t" * 300}
PIN = REVISIONS[WAN]


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def table(**changes: FileInfo) -> list[RemoteFile]:
    return [
        RemoteFile("vae", WAN, path, f"wan/{path}", changes.get(path, FileInfo(len(data), sha256(data))))
        for path, data in CONTENT.items()
    ]


class FakeHub:
    """A hub with CONTENT in it, which can be told to fail: `trouble` is called with the path and the part file."""

    def __init__(self, trouble=None):
        self.trouble = trouble
        self.fetched = Counter()
        self.bytes_sent = 0

    def info(self, repo: str, path: str, revision: str) -> FileInfo:
        return FileInfo(len(CONTENT[path]), sha256(CONTENT[path]))

    def fetch(self, repo: str, path: str, revision: str, folder: Path) -> Path:
        self.fetched[path] += 1
        part = folder / "part.incomplete"
        have = part.stat().st_size if part.exists() else 0
        if self.trouble is not None:
            replaced = self.trouble(path, part)
            if replaced is not None:
                part.write_bytes(replaced)
                return part
        self.bytes_sent += len(CONTENT[path]) - have
        with part.open("ab") as file:
            file.write(CONTENT[path][have:])
        return part


def fetch_all(folder: Path, hub: FakeHub, files=None, **options) -> list[str]:
    lines: list[str] = []
    revisions = options.pop("revisions", REVISIONS)
    download(
        table() if files is None else files, folder, revisions=revisions, source_of=lambda repo: hub,
        report=lines.append, **options,
    )
    return lines


def contents(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


EXPECTED = {f"wan/{path}": data for path, data in CONTENT.items()}


def without_lock(folder: Path) -> dict[str, bytes]:
    return {name: data for name, data in contents(folder).items() if name != LOCK}


def test_files_arrive_whole_and_are_not_fetched_twice(tmp_path):
    """Everything is in place with the right bytes and nothing else; a second run needs no hub at all."""
    hub = FakeHub()
    fetch_all(tmp_path, hub)
    assert without_lock(tmp_path) == EXPECTED
    lock = json.loads((tmp_path / LOCK).read_text())
    assert lock["wan/vae.pth"] == {
        "repo": WAN, "revision": PIN, "path": "vae.pth", "bytes": 5000, "sha256": sha256(CONTENT["vae.pth"]),
    }
    lines = fetch_all(tmp_path, None)
    assert all(line.startswith("in place") for line in lines) and len(lines) == 3
    assert set(hub.fetched.values()) == {1}


def test_a_corrupt_file_is_fetched_again_and_never_put_in_place(tmp_path):
    """One bad arrival is repaired by a second try; a file that stays bad is an error and leaves nothing."""
    bad = iter([b"w" * 5000])
    once = FakeHub(lambda path, part: next(bad, None) if path == "vae.pth" else None)
    fetch_all(tmp_path / "once", once)
    assert without_lock(tmp_path / "once") == EXPECTED and once.fetched["vae.pth"] == 2

    always = FakeHub(lambda path, part: b"w" * 5000 if path == "vae.pth" else None)
    with pytest.raises(DownloadError, match=r"vae.pth.*arrived damaged 2 times: its SHA-256 is"):
        fetch_all(tmp_path / "always", always)
    assert without_lock(tmp_path / "always") == {"wan/config.json": b"{}"}
    short = FakeHub(lambda path, part: b"v" * 4999 if path == "vae.pth" else None)
    with pytest.raises(DownloadError, match="it has 4999 bytes and 5000 are expected"):
        fetch_all(tmp_path / "always", short)


def test_an_interruption_is_resumed(tmp_path, capsys, monkeypatch):
    """Ctrl-C half-way: no file under its final name, exit status 130; the next run sends only the rest."""

    def stop(path, part):
        if path == "vae.pth" and not part.exists():
            part.write_bytes(CONTENT["vae.pth"][:3000])
            raise KeyboardInterrupt

    hub = FakeHub(stop)
    monkeypatch.setattr(module, "FILES", table())
    arguments = ["--only", "vae", "--folder", str(tmp_path)]
    assert main(arguments, source_of=lambda repo: hub) == 130
    assert "Nothing is lost" in capsys.readouterr().err
    assert not (tmp_path / "wan/vae.pth").exists() and (tmp_path / "wan/config.json").exists()
    assert main(["--only", "vae", "--folder", str(tmp_path)], source_of=lambda repo: hub) == 0
    assert without_lock(tmp_path) == EXPECTED
    assert hub.bytes_sent == sum(map(len, CONTENT.values())) - 3000


def test_finishing_one_file_keeps_the_half_of_another(tmp_path):
    """Files under way do not share a folder, so fetching a second one spares the first one's part."""

    def stop(path, part):
        if path == "vae.pth" and not part.exists():
            part.write_bytes(CONTENT["vae.pth"][:3000])
            raise KeyboardInterrupt

    hub = FakeHub(stop)
    by_path = {file.path: file for file in table()}
    with pytest.raises(KeyboardInterrupt):
        fetch_all(tmp_path, hub, [by_path["vae.pth"]])
    fetch_all(tmp_path, hub, [by_path["config.json"]])
    fetch_all(tmp_path, hub, [by_path["vae.pth"]])
    assert hub.bytes_sent == 2 + 2000 and not list(tmp_path.rglob(".download"))


def test_a_full_disk_is_told_before_and_during(tmp_path, monkeypatch):
    """Too little space is an error before the first byte; a disk that fills up later says what to do."""

    def full(path, part):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with pytest.raises(DownloadError, match=r"wan/config.json: the disk is full \(.* free\).*Nothing is lost"):
        fetch_all(tmp_path, FakeHub(full))
    usage = module.shutil.disk_usage(tmp_path)
    monkeypatch.setattr(module.shutil, "disk_usage", lambda path: usage._replace(free=5000))
    hub = FakeHub()
    with pytest.raises(DownloadError, match=r"5\.3 kB are needed and 5\.0 kB are free"):
        fetch_all(tmp_path, hub)
    assert not hub.fetched and without_lock(tmp_path) == {}


def test_no_network_is_told_plainly(tmp_path, capsys, monkeypatch):
    """The command ends with one line that names what was asked, the cause and the remedy, and status 1."""

    def offline(path, part):
        raise _told(ConnectionError("Name or service not known"), f"fetching {path}")

    monkeypatch.setattr(module, "FILES", table())
    assert main(["--only", "vae", "--folder", str(tmp_path)], source_of=lambda repo: FakeHub(offline)) == 1
    said = capsys.readouterr().err
    assert said.startswith("error: fetching config.json failed: ConnectionError: Name or service not known. ")
    assert "Check the connection" in said and said.count("\n") == 1 and without_lock(tmp_path) == {}


def test_the_real_client_wraps_every_error(tmp_path, monkeypatch):
    """Errors of the hub's library become DownloadError with its text; those of the disk stay OSError."""
    import huggingface_hub

    def fail(error):
        def call(*args, **kwargs):
            raise error
        return call

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", fail(RuntimeError("No space left on device (os error 28)")))
    with pytest.raises(OSError, match="No space left"):
        HuggingFaceHub().fetch(WAN, "config.json", PIN, tmp_path)
    remedies = {TimeoutError("slow"): "Check the connection", RevisionNotFoundError("gone"): "--revision"}
    for error, remedy in remedies.items():
        monkeypatch.setattr(huggingface_hub, "hf_hub_download", fail(error))
        with pytest.raises(DownloadError, match=f"{type(error).__name__}: .*{remedy}"):
            HuggingFaceHub().fetch(WAN, "config.json", PIN, tmp_path)


class RevisionNotFoundError(Exception):
    """Named like the hub's own."""


def test_the_real_client_reads_the_hubs_description(monkeypatch):
    """LFS files give their SHA-256, others their git id; a missing file is an error."""
    from huggingface_hub import HfApi
    from huggingface_hub.hf_api import RepoFile

    found = {
        "big": RepoFile(path="big", size=9, oid="g1", lfs={"size": 9, "oid": "s1", "pointerSize": 1}),
        "small": RepoFile(path="small", size=3, oid="g2"),
    }

    def answer(self, repo, paths, revision):
        return [found[path] for path in paths if path in found]

    monkeypatch.setattr(HfApi, "get_paths_info", answer)
    assert HuggingFaceHub().info(WAN, "big", "main") == FileInfo(9, "s1", None)
    assert HuggingFaceHub().info(WAN, "small", "main") == FileInfo(3, None, "g2")
    with pytest.raises(DownloadError, match="has no file other"):
        HuggingFaceHub().info(WAN, "other", "main")


def test_files_that_are_different_are_never_replaced_unasked(tmp_path):
    """Another file in the place is an error that offers --overwrite; with it the pinned file comes."""
    mine = tmp_path / "wan/vae.pth"
    mine.parent.mkdir()
    mine.write_bytes(b"mine" * 1250)
    with pytest.raises(DownloadError, match=r"vae.pth is there, but its SHA-256 is .*--overwrite"):
        fetch_all(tmp_path, FakeHub())
    assert mine.read_bytes() == b"mine" * 1250
    fetch_all(tmp_path, FakeHub(), overwrite=True)
    assert without_lock(tmp_path) == EXPECTED


def test_a_file_that_changed_after_its_download_is_noticed(tmp_path):
    """Where only the lock knows the hash (another revision), a later change of the file is an error."""
    revisions = {**REVISIONS, WAN: "main"}
    fetch_all(tmp_path, FakeHub(), revisions=revisions)
    assert len(fetch_all(tmp_path, None, revisions=revisions)) == 3  # the lock suffices, no hub needed
    (tmp_path / "wan/config.json").write_bytes(b"[]")
    with pytest.raises(DownloadError, match="config.json is there, but its SHA-256"):
        fetch_all(tmp_path, None, revisions=revisions)


def test_hub_and_pin_must_agree(tmp_path):
    """If the hub states another hash than the pinned one, nothing is fetched."""
    hub = FakeHub()
    with pytest.raises(DownloadError, match="states sha256 .* is pinned. Nothing was fetched"):
        fetch_all(tmp_path, hub, table(**{"vae.pth": FileInfo(5000, "0" * 64)}))
    assert hub.fetched == {"config.json": 1} and not (tmp_path / "wan/vae.pth").exists()


def test_files_outside_lfs_are_checked_by_their_git_id(tmp_path):
    """Without a SHA-256 the git blob id decides: sha1 of the header and the bytes, as git computes it."""

    class PlainHub(FakeHub):
        def info(self, repo, path, revision):
            data = CONTENT[path]
            return FileInfo(len(data), None, hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest())

    revisions = {**REVISIONS, WAN: "main"}
    fetch_all(tmp_path / "good", PlainHub(), revisions=revisions)
    assert without_lock(tmp_path / "good") == EXPECTED
    damaging = PlainHub(lambda path, part: b"[]" if path == "config.json" else None)
    with pytest.raises(DownloadError, match="its git id is"):
        fetch_all(tmp_path / "bad", damaging, revisions=revisions)
    hello = tmp_path / "hello"
    hello.write_bytes(b"hello world\n")  # whose id `git hash-object` gives
    assert module._difference(hello, FileInfo(git_sha1="3b18e512dba79e4c8300dd08aeb37f8e728b8dad")) is None


def test_dry_run_lists_and_touches_nothing(tmp_path, capsys):
    """The list has every file and its size, needs no hub for pinned files, and makes no folder."""
    assert main(["--dry_run", "--folder", str(tmp_path / "new")], source_of=lambda repo: None) == 0
    listed = capsys.readouterr().out
    assert all(file.target in listed for file in FILES if file.group in ("dit", "text", "vae"))
    assert "in all 17.6 GB" in listed and "diffusion_pytorch_model" not in listed and not (tmp_path / "new").exists()
    assert main(["--dry_run", "--only", "base", "--folder", str(tmp_path)], source_of=lambda repo: None) == 0
    assert "5.7 GB" in capsys.readouterr().out


def test_options_choose_groups_and_revisions(tmp_path, capsys):
    """--prompts alone means only prompts; a wrong --revision names the known repositories."""
    assert main(["--prompts", "--dry_run", "--folder", str(tmp_path)]) == 0
    listed = capsys.readouterr().out
    assert "MovieGenVideoBench.txt" in listed and "MovieGenVideoBench_extended.txt" in listed and ".pth" not in listed
    assert main(["--revision", "nobody/nothing=main"]) == 1
    assert SELF_FORCING in capsys.readouterr().err


def test_table_is_sane():
    """Pins are full commits and SHA-256, targets are unique and where inference looks for them.

    Other methods' checkpoints are not pinned, and no default download asks for them.
    """
    unpinned = {group for group, *_ in METHOD_FILES}
    assert not unpinned & set(DEFAULT_GROUPS)
    floating = {repo for _, repo, *_ in METHOD_FILES}
    assert all(REVISIONS[repo] == "main" for repo in floating)
    assert all(re.fullmatch("[0-9a-f]{40}", REVISIONS[repo]) for repo in set(REVISIONS) - floating)
    assert len({file.target for file in FILES}) == len(FILES)
    targets = {file.target for file in FILES}
    assert {"checkpoints/self_forcing_dmd.pt", "wan_models/Wan2.1-T2V-1.3B/Wan2.1_VAE.pth"} <= targets
    for file in FILES:
        if file.group not in {"prompts", *unpinned}:
            assert re.fullmatch("[0-9a-f]{64}", file.pinned.sha256) and file.pinned.size_bytes != 0


# GitHub, over a real connection to this machine ---------------------------------------------------

PAGES = {
    "a.txt": b"one\ntwo\n" * 500,
    "b.txt": b"ONE\nTWO\n" * 500,
    "odd.txt": b"one\n",
    "lfs.txt": b"version https://git-lfs.github.com/spec/v1\n",
}


class Server(http.server.BaseHTTPRequestHandler):
    """Serves PAGES with ranges; the first answer for a.txt breaks off in the middle."""

    protocol_version = "HTTP/1.0"
    broken_once: set[str]
    ranges: list[str | None]

    def do_GET(self):
        name = self.path.rsplit("/", 1)[-1]
        if name not in PAGES:
            self.send_error(404)
            return
        data, wanted = PAGES[name], self.headers.get("Range")
        type(self).ranges.append(wanted)
        start = int(wanted.removeprefix("bytes=").removesuffix("-")) if wanted else 0
        if start >= len(data):
            self.send_error(416)
            return
        self.send_response(206 if wanted else 200)
        self.send_header("Content-Length", str(len(data) - start))
        self.end_headers()
        breaks = name == "a.txt" and name not in self.broken_once
        type(self).broken_once.add(name)
        self.wfile.write(data[start:1000] if breaks else data[start:])

    def log_message(self, *_):
        pass


@pytest.fixture
def github():
    handler = type("Handler", (Server,), {"broken_once": set(), "ranges": []})
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield GitHub(f"http://127.0.0.1:{server.server_address[1]}"), handler
    server.shutdown()
    thread.join()
    server.server_close()


def prompts(*names: str) -> list[RemoteFile]:
    return [RemoteFile("prompts", module.PROMPT_REPO, f"prompts/{name}", f"prompts/{name}") for name in names]


def fetch_prompts(folder: Path, source: GitHub, *names: str) -> None:
    download(prompts(*names), folder, revisions=REVISIONS, source_of=lambda repo: source, report=lambda line: None)


def test_a_broken_connection_resumes_with_a_range(tmp_path, github):
    """The first try ends in the middle and is told; the second asks for the rest only; the file is right."""
    source, handler = github
    with pytest.raises(DownloadError, match="connection broke"):
        fetch_prompts(tmp_path, source, "a.txt")
    assert not (tmp_path / "prompts/a.txt").exists()
    fetch_prompts(tmp_path, source, "a.txt", "b.txt")
    assert handler.ranges == [None, "bytes=1000-", None]
    assert without_lock(tmp_path) == {"prompts/a.txt": PAGES["a.txt"], "prompts/b.txt": PAGES["b.txt"]}


def test_unusable_answers_are_told(tmp_path, github):
    """Missing files, LFS pointers, files of different lengths, and a server that is gone."""
    source, _ = github
    with pytest.raises(DownloadError, match=r"HTTP 404.*--revision guandeh17/Self-Forcing=main"):
        fetch_prompts(tmp_path, source, "none.txt")
    with pytest.raises(DownloadError, match="pointer into Git LFS"):
        fetch_prompts(tmp_path, source, "lfs.txt")
    with pytest.raises(DownloadError, match=r"different numbers of lines \(b.txt 1000, odd.txt 1\)"):
        fetch_prompts(tmp_path, source, "b.txt", "odd.txt")
    with pytest.raises(DownloadError, match="cannot be reached"):
        fetch_prompts(tmp_path, GitHub("http://127.0.0.1:9"), "a.txt")


def test_a_part_that_is_already_complete_starts_over(tmp_path, github):
    """A part as long as the file cannot be resumed (416); it is fetched anew and right."""
    source, handler = github
    (tmp_path / f"b.txt.{REVISIONS[module.PROMPT_REPO][:12]}.part").write_bytes(b"x" * len(PAGES["b.txt"]))
    got = source.fetch(module.PROMPT_REPO, "prompts/b.txt", REVISIONS[module.PROMPT_REPO], tmp_path)
    assert got == tmp_path / "b.txt" and got.read_bytes() == PAGES["b.txt"]
    assert handler.ranges == [f"bytes={len(PAGES['b.txt'])}-", None]
