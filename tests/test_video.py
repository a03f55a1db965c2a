"""Laws of video files: what is decoded is what was written, and nothing half-written has a final name."""
from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import threading
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
from PIL import Image

from utils import video
from utils.files import hold, remove_stale, temp_files, temp_path
from utils.video import QUEUE_CHUNKS, VideoWriter, fit_to, read_image, read_video

ROOT = Path(__file__).resolve().parents[1]


def smooth_clip(num_frames: int, height: int = 48, width: int = 80) -> np.ndarray:
    """Soft colour waves that move a little: uint8 [T, H, W, 3]."""
    t, y, x = np.meshgrid(np.arange(num_frames), np.arange(height), np.arange(width), indexing="ij")
    waves = [np.sin(x / 30 + t / 6), np.cos(y / 26 - t / 7), np.sin((x + y) / 40 + t / 9)]
    return (128 + 90 * np.stack(waves, axis=-1)).astype(np.uint8)


def write(path: Path, *chunks: np.ndarray, fps: float = 16) -> Path:
    with VideoWriter(path, fps=fps) as writer:
        for chunk in chunks:
            writer.write(chunk)
    return path


def names(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir())


def test_decoded_video_is_what_was_written(tmp_path):
    """Frame count, size, rate, format and colour tags are as asked, and pixels come back closely."""
    clip = smooth_clip(29)
    path = write(tmp_path / "v.mp4", clip[:9], clip[9:21], clip[21:])
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        context = stream.codec_context
        assert (stream.frames, stream.height, stream.width) == (29, 48, 80)
        assert stream.average_rate == 16 and context.pix_fmt == "yuv420p" and context.name == "h264"
        assert (context.color_range, context.colorspace, context.color_primaries, context.color_trc) == (1, 1, 1, 1)
        times = [frame.time for frame in container.decode(stream)]
    assert times == pytest.approx([i / 16 for i in range(29)])
    difference = np.abs(read_video(path).astype(int) - clip)
    assert difference.mean() < 2 and np.percentile(difference, 99) < 8


def test_index_stands_before_the_pictures(tmp_path):
    """faststart: the moov box comes before mdat, so that playback begins before the download ends."""
    data, boxes, at = write(tmp_path / "v.mp4", smooth_clip(12)).read_bytes(), [], 0
    while at < len(data):
        boxes.append(data[at + 4 : at + 8])
        at += int.from_bytes(data[at : at + 4], "big")
    assert boxes.index(b"moov") < boxes.index(b"mdat") and at == len(data)


def test_flat_colours_survive_to_two_levels(tmp_path):
    """Colour matrix and range agree between tags and content: primaries and grey come back."""
    colours = [(255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255), (0, 0, 0), (128, 64, 200)]
    clip = np.stack([np.full((32, 32, 3), colour, np.uint8) for colour in colours])
    decoded = read_video(write(tmp_path / "v.mp4", clip))
    assert np.abs(decoded.mean(axis=(1, 2)) - np.array(colours)).max() <= 2.5


def test_chunking_does_not_change_the_file(tmp_path):
    """The same frames give the same bytes, however they are cut into chunks, and from tensors as from arrays."""
    torch = pytest.importorskip("torch")
    clip = smooth_clip(24)
    one = write(tmp_path / "one.mp4", clip).read_bytes()
    many = write(tmp_path / "many.mp4", *[torch.from_numpy(clip[i : i + 5]) for i in range(0, 24, 5)]).read_bytes()
    assert one == many


def test_equal_frames_give_equal_files(tmp_path):
    """No run of the encoder differs from another by a byte, also at sizes that are no multiple of 16."""
    clip = smooth_clip(8, 240, 416)
    for height, width in ((240, 416), (50, 90)):
        files = {write(tmp_path / "v.mp4", clip[:, :height, :width]).read_bytes() for _ in range(25)}
        assert len(files) == 1


def test_colours_do_not_depend_on_threads(tmp_path, monkeypatch):
    """One thread converts to and from RGB as four do: the same file, the same pixels."""
    clip = np.random.default_rng(0).integers(0, 256, (2, 98, 162, 3), np.uint8)
    ours = write(tmp_path / "ours.mp4", clip)
    pixels = read_video(ours)
    monkeypatch.setattr(video, "RGB_THREADS", 4)
    assert write(tmp_path / "theirs.mp4", clip).read_bytes() == ours.read_bytes()
    assert np.array_equal(read_video(ours), pixels)


def test_caller_may_reuse_its_buffer(tmp_path):
    """write() copies: overwriting the array afterwards leaves the video as it was."""
    clip = smooth_clip(8)
    expected = write(tmp_path / "expected.mp4", clip).read_bytes()
    with VideoWriter(tmp_path / "v.mp4", fps=16) as writer:
        buffer = clip.copy()
        writer.write(buffer)
        buffer[:] = 0
    assert (tmp_path / "v.mp4").read_bytes() == expected


@pytest.mark.parametrize(("height", "width", "advice"), [(47, 80, "48x80"), (48, 81, "48x82"), (47, 81, "48x82")])
def test_odd_sizes_are_refused(tmp_path, height, width, advice):
    """yuv420p needs even sizes: the error says so, names a size that works, and leaves no file."""
    with pytest.raises(ValueError, match=rf"multiple of 2.*{advice}"):
        write(tmp_path / "v.mp4", np.zeros((2, height, width, 3), np.uint8))
    assert names(tmp_path) == []


@pytest.mark.parametrize(
    ("frames", "said"),
    [
        (np.zeros((2, 3, 48, 80), np.uint8), r"uint8 \[T, H, W, 3\]"),
        (np.zeros((2, 48, 80, 3), np.float32), "float32"),
        (np.zeros((2, 48, 48, 3), np.uint8), "changed from 48x80 to 48x48"),
    ],
)
def test_wrong_frames_are_refused(tmp_path, frames, said):
    """Frames of another layout, type or size than the video's are an error that says what came."""
    with pytest.raises(ValueError, match=said), VideoWriter(tmp_path / "v.mp4", fps=16) as writer:
        writer.write(smooth_clip(2))
        writer.write(frames)
    assert names(tmp_path) == []


def test_bad_settings_and_empty_videos_are_refused(tmp_path):
    """fps must be positive, the name must end in .mp4, and a video needs a frame."""
    with pytest.raises(ValueError, match="fps=0"):
        VideoWriter(tmp_path / "v.mp4", fps=0)
    with pytest.raises(ValueError, match=r"\.mp4"):
        VideoWriter(tmp_path / "v.avi", fps=16)
    with pytest.raises(ValueError, match="no frames"), VideoWriter(tmp_path / "v.mp4", fps=16):
        pass
    assert names(tmp_path) == []


def test_final_name_appears_only_at_the_end(tmp_path):
    """While writing there is one hidden temporary file; afterwards only the video."""
    with VideoWriter(tmp_path / "v.mp4", fps=16) as writer:
        writer.write(smooth_clip(4))
        assert writer.frames_written == 4
        (temporary,) = names(tmp_path)
        assert temporary.startswith(".v.") and temporary.endswith(".tmp.mp4")
    assert names(tmp_path) == ["v.mp4"]


def test_an_exception_removes_what_was_written_and_spares_the_old_video(tmp_path):
    """Leaving by an exception leaves the folder as it was before."""
    old = write(tmp_path / "v.mp4", smooth_clip(4)).read_bytes()
    with pytest.raises(RuntimeError, match="stop"), VideoWriter(tmp_path / "v.mp4", fps=16) as writer:
        writer.write(smooth_clip(8))
        raise RuntimeError("stop")
    assert names(tmp_path) == ["v.mp4"] and (tmp_path / "v.mp4").read_bytes() == old


def test_partial_video_is_kept_when_asked(tmp_path):
    """keep_partial finishes the frames so far under another name; without frames it keeps nothing."""
    clip = smooth_clip(12)
    with pytest.raises(KeyboardInterrupt), VideoWriter(tmp_path / "v.mp4", fps=16) as writer:
        writer.write(clip)
        assert writer.keep_partial() == tmp_path / "v.partial.mp4"
        raise KeyboardInterrupt
    with VideoWriter(tmp_path / "w.mp4", fps=16) as writer:
        assert writer.keep_partial() is None
    assert names(tmp_path) == ["v.partial.mp4"]
    assert len(read_video(tmp_path / "v.partial.mp4")) == 12


def test_stale_files_of_the_same_stem_go_and_others_stay(tmp_path):
    """The next start of a stem removes what killed runs left of it, and of nothing else."""
    stale = [temp_path(tmp_path / "v.mp4") for _ in range(2)]
    others = [temp_path(tmp_path / "w.mp4"), temp_path(tmp_path / "v.x.mp4"), tmp_path / ".v.tmp.mp4"]
    for path in stale + others:
        path.write_bytes(b"half")
    write(tmp_path / "v.mp4", smooth_clip(2))
    assert names(tmp_path) == sorted(["v.mp4", *(p.name for p in others)])


def test_a_video_that_is_being_written_is_left_alone(tmp_path):
    """A second writer of the same stem is refused while the first is alive, which then finishes."""
    with VideoWriter(tmp_path / "v.mp4", fps=16) as first:
        first.write(smooth_clip(4))
        with pytest.raises(OSError, match="another process is writing"):
            VideoWriter(tmp_path / "v.mp4", fps=16).__enter__()
        first.write(smooth_clip(4))
    assert len(read_video(tmp_path / "v.mp4")) == 8 and temp_files(tmp_path / "v.mp4") == []
    hold(tmp_path / "v.mp4").close()  # nothing holds the finished file any more


def test_a_run_that_cleans_up_meanwhile_costs_nothing(tmp_path, monkeypatch):
    """It takes a file that nobody holds yet for a killed run's: the writer makes another."""
    taken = []

    def cleaned_up_before(path):
        if not taken:
            taken.append(path)
            assert remove_stale(tmp_path / "v.mp4") == 1
        return hold(path)

    monkeypatch.setattr("utils.files.hold", cleaned_up_before)
    write(tmp_path / "v.mp4", smooth_clip(2))
    assert taken and names(tmp_path) == ["v.mp4"]


def test_killed_process_leaves_nothing_that_looks_finished(tmp_path):
    """SIGKILL in the middle: no .mp4 without a dot in front; the next writer cleans up and succeeds."""
    code = (
        "import numpy as np, sys; from pathlib import Path; from utils.video import VideoWriter\n"
        "with VideoWriter(Path(sys.argv[1]), fps=16) as writer:\n"
        "    writer.write(np.zeros((4, 32, 32, 3), np.uint8)); print('ready', flush=True); sys.stdin.read()\n"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "v.mp4")]
    child = subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    try:
        assert child.stdout.readline() == b"ready\n"
    finally:
        child.send_signal(signal.SIGKILL)
        child.communicate()
    assert len(temp_files(tmp_path / "v.mp4")) == 1 and names(tmp_path)[0].startswith(".")
    write(tmp_path / "v.mp4", smooth_clip(2))
    assert names(tmp_path) == ["v.mp4"]


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="file size limits as on Linux")
@pytest.mark.parametrize("room", [0, 200_000])
def test_a_full_disk_loses_only_that_video(tmp_path, room):
    """A write that the system refuses, be it the first, becomes an OSError naming the video and what is safe."""
    write(tmp_path / "before.mp4", smooth_clip(4))
    code = (
        "import numpy as np, resource, signal, sys; from pathlib import Path; from utils.video import VideoWriter\n"
        f"signal.signal(signal.SIGXFSZ, signal.SIG_IGN); resource.setrlimit(resource.RLIMIT_FSIZE, ({room},) * 2)\n"
        "noise = np.random.default_rng(0).integers(0, 255, (8, 96, 160, 3), dtype=np.uint8)\n"
        "try:\n"
        "    with VideoWriter(Path(sys.argv[1]), fps=16) as writer:\n"
        "        for _ in range(8): writer.write(noise)\n"
        "except OSError as error: print(error.errno, error)\n"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "v.mp4")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.startswith(str(errno.EFBIG))
    assert "v.mp4: could not write this video" in done.stdout and "finished before it are safe" in done.stdout
    assert names(tmp_path) == ["before.mp4"] and len(read_video(tmp_path / "before.mp4")) == 4


def test_a_failure_at_the_very_end_is_told_too(tmp_path, monkeypatch):
    """A disk that fills up only while closing gives the same kind of error and no deadlock."""
    monkeypatch.setattr("utils.video._Encoder.close", lambda self: self._fail())
    monkeypatch.setattr("utils.video._Encoder._fail", _no_space, raising=False)
    with pytest.raises(OSError, match="v.mp4: could not write.*No space left.*MiB free") as caught:
        write(tmp_path / "v.mp4", smooth_clip(4))
    assert caught.value.errno == errno.ENOSPC and names(tmp_path) == []


def _no_space(self):
    self.container.close()
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize("folder", ["missing", "file.txt"])
def test_unwritable_folder_is_a_clear_error(tmp_path, folder):
    """A folder that is missing or no folder is refused before the first frame, naming the video."""
    (tmp_path / "file.txt").write_text("")
    with pytest.raises(OSError, match=rf"{folder}/v.mp4: could not write"):
        VideoWriter(tmp_path / folder / "v.mp4", fps=16).__enter__()


def test_memory_and_threads_do_not_grow(tmp_path):
    """A bounded number of chunks waits for the encoder, and no thread outlives its video."""
    before = threading.active_count()
    with VideoWriter(tmp_path / "v.mp4", fps=16) as writer:
        for _ in range(20):
            writer.write(smooth_clip(1))
            assert writer._queue.qsize() <= QUEUE_CHUNKS < 20
    assert threading.active_count() == before and len(read_video(tmp_path / "v.mp4")) == 20


def test_reading_first_last_and_retimed_frames(tmp_path):
    """max_frames keeps the first or the last; fps picks the frame that is shown at each tick."""
    grey = np.stack([np.full((32, 32, 3), 8 * i, np.uint8) for i in range(24)])
    path = write(tmp_path / "v.mp4", grey, fps=24)
    level = lambda clip: np.rint(clip.mean(axis=(1, 2, 3)) / 8).astype(int).tolist()  # noqa: E731
    assert level(read_video(path)) == list(range(24))
    assert level(read_video(path, 5)) == list(range(5))
    assert level(read_video(path, 5, last=True)) == list(range(19, 24))
    assert level(read_video(path, fps=16)) == [int(Fraction(k, 16) * 24) for k in range(16)]
    assert level(read_video(path, fps=48)) == [k // 2 for k in range(48)]
    assert level(read_video(path, 3, fps=12, last=True)) == [18, 20, 22]


def test_unreadable_sources_are_clear_errors(tmp_path):
    """Missing files, files of another kind, and cut files are told apart from a crash."""
    (tmp_path / "text.mp4").write_text("no video")
    whole = write(tmp_path / "v.mp4", smooth_clip(8)).read_bytes()
    (tmp_path / "cut.mp4").write_bytes(whole[:200])
    for read, name in ((read_video, "none.mp4"), (read_image, "none.png")):
        with pytest.raises(FileNotFoundError, match="no such"):
            read(tmp_path / name)
    for name in ("text.mp4", "cut.mp4"):
        with pytest.raises(ValueError, match="cannot be decoded|no video"):
            read_video(tmp_path / name)
    with pytest.raises(ValueError, match="cannot be read as an image"):
        read_image(tmp_path / "text.mp4")
    with pytest.raises(ValueError, match="max_frames=0"):
        read_video(tmp_path / "v.mp4", 0)


def test_images_are_upright_rgb(tmp_path):
    """Grey, transparent and camera-rotated images all become RGB as a viewer shows them."""
    picture = smooth_clip(1)[0]
    Image.fromarray(picture).save(tmp_path / "rgb.png")
    assert np.array_equal(read_image(tmp_path / "rgb.png"), picture[None])
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned by a quarter
    Image.fromarray(np.rot90(picture)).save(tmp_path / "turned.png", exif=exif)
    assert np.array_equal(read_image(tmp_path / "turned.png"), picture[None])
    alpha = np.dstack([picture, np.zeros(picture.shape[:2], np.uint8)])
    Image.fromarray(alpha).save(tmp_path / "clear.png")
    assert read_image(tmp_path / "clear.png").max() == 0
    Image.fromarray(picture[..., 0]).save(tmp_path / "grey.png")
    assert np.array_equal(read_image(tmp_path / "grey.png")[0], np.repeat(picture[..., :1], 3, axis=-1))


def test_fit_covers_and_centres():
    """The result has the size asked for, keeps the middle, and is the input itself where it fits."""
    clip = smooth_clip(3)
    assert fit_to(clip, 48, 80) is clip
    assert np.array_equal(fit_to(clip, 48, 40), clip[:, :, 20:60])  # same height: a pure centre cut
    stripes = np.zeros((1, 64, 64, 3), np.uint8)
    stripes[:, :, 32:] = 255
    half = fit_to(stripes, 16, 8)
    assert half.shape == (1, 16, 8, 3) and half[..., :3, :].max() < 40 and half[..., 5:, :].min() > 215
    with pytest.raises(ValueError, match="at least 1"):
        fit_to(clip, 0, 80)
