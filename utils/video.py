"""Video files: written as the frames are made, read back as arrays.

Written files open anywhere: H.264, yuv420p, limited range BT.709 and tagged so, index at the front
(faststart). Memory does not grow with the video, and nothing under the final name is ever half a video.

T pixel frames, H height, W width; every array is uint8 RGB [T, H, W, 3].
"""
from __future__ import annotations

import contextlib
import errno
import itertools
import math
import queue
import shutil
import threading
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
from PIL import Image, ImageOps

from utils.files import BeingWrittenError, begin_temporary, move_into_place, temp_path

BT709 = 1  # the same number for matrix, primaries and transfer in H.264
BT601 = 5
LIMITED, FULL = 1, 2  # libav colour ranges
MATRICES = {1: 1, 4: 4, 5: BT601, 6: BT601, 7: 7, 9: 9}  # libav colour space -> libswscale matrix
HD_HEIGHT = 720  # untagged video is BT.709 from here on, BT.601 below, by common convention
QUEUE_CHUNKS = 6  # some 14 MB each at 832x480: room for moments when the encoder is slower than the maker of frames
ENCODER_THREADS = 4  # fixed: x264 gives the same bytes everywhere only for the same number of threads
RGB_THREADS = 1  # to and from RGB; left to itself, PyAV starts and ends a thread a processor for every single frame
X264_PARAMS = "mbtree=0"  # with mbtree, equal frames now and then give other bytes (it reads memory nobody set)
KEYFRAME_SECONDS = 4
FIRST_BYTES = 4096  # where not even these fit, libav would end the process; they are overwritten
REMEDY = (
    "Videos finished before it are safe; make room or choose another --output_folder, then run the same command again: "
    "only this one is redone"
)


class VideoWriter:
    """Write one H.264 video, streaming.

    Use as a context manager. Leaving normally finishes the file and renames it to `path`; leaving by an
    exception removes what was written, unless `keep_partial` was called. Encoding runs in a thread of its
    own, at most QUEUE_CHUNKS behind, so that the maker of the frames does not wait for it.

    Args: path, ending in .mp4, in an existing folder; fps in pixel frames per second; remedy, what a user
        can do where the file cannot be written.
    Raises: OSError (disk full, no permission) names the video, the cause, and the remedy; ValueError for
        frames of a wrong shape or size. Equal frames give equal files, byte for byte.
    """

    def __init__(self, path: Path, *, fps: float, crf: int = 17, preset: str = "veryfast", remedy: str = REMEDY):
        self.path, self.remedy = Path(path), remedy
        if self.path.suffix.lower() != ".mp4":
            raise ValueError(f"{path}: videos are written as .mp4, got {self.path.suffix or 'no suffix'!r}. Rename it")
        if not (fps > 0 and math.isfinite(fps)):
            raise ValueError(f"{path}: fps={fps} is no frame rate. Give a positive number, for example 16")
        self.fps = Fraction(fps).limit_denominator(1001)
        self._options = {"crf": str(crf), "preset": preset, "x264-params": X264_PARAMS}
        self._temporary = temp_path(self.path)
        self._queue: queue.Queue[np.ndarray | None] = queue.Queue(QUEUE_CHUNKS)
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None
        self._abandoned = False
        self._lock = None
        self._size: tuple[int, int] | None = None
        self._frames = 0

    @property
    def frames_written(self) -> int:
        """Pixel frames taken so far."""
        return self._frames

    def __enter__(self) -> VideoWriter:
        try:
            self._temporary, self._lock = begin_temporary(self.path)
            self._temporary.write_bytes(bytes(FIRST_BYTES))
        except BeingWrittenError:
            raise
        except OSError as error:
            if self._temporary.exists():
                self._abandon()
            raise self._described(error) from error
        self._thread = threading.Thread(target=self._encode_all, name=f"encode {self.path.name}", daemon=True)
        self._thread.start()
        return self

    def write(self, frames) -> None:
        """Append frames uint8 [T, H, W, 3] (numpy or CPU tensor); they are copied before this returns."""
        frames = np.asarray(frames).copy(order="C")
        if frames.ndim != 4 or frames.shape[-1] != 3 or frames.dtype != np.uint8:
            raise ValueError(
                f"{self.path}: frames must be uint8 [T, H, W, 3], got {frames.dtype} {list(frames.shape)}. "
                "Convert them first (wan.stream.to_uint8)"
            )
        self._check_size(frames.shape[1], frames.shape[2])
        self._raise_if_failed()
        if self._thread is None:
            raise ValueError(f"{self.path}: the writer is closed. Write inside its `with` block")
        if len(frames):
            self._queue.put(frames)
            self._frames += len(frames)

    def keep_partial(self) -> Path | None:
        """Finish what was written as `<stem>.partial.mp4` and close. None if there is no frame to keep."""
        if self._frames == 0:
            self._abandon()
            return None
        partial = self.path.with_name(f"{self.path.stem}.partial{self.path.suffix}")
        self._finish(partial)
        return partial

    def __exit__(self, kind, error, trace) -> None:
        if self._thread is None:  # already closed by keep_partial
            return
        if kind is not None:
            self._abandon()
            return
        if self._frames == 0:
            self._abandon()
            raise ValueError(f"{self.path}: no frames were written, so there is no video to make")
        self._finish(self.path)

    def _check_size(self, height: int, width: int) -> None:
        if height % 2 or width % 2 or not height or not width:
            raise ValueError(
                f"{self.path}: frames are {height}x{width} (height x width), but H.264 with yuv420p stores colour "
                f"at half size and needs a multiple of 2 in both. Use {height + height % 2}x{width + width % 2}"
            )
        if self._size not in (None, (height, width)):
            raise ValueError(
                f"{self.path}: frames changed from {self._size[0]}x{self._size[1]} to {height}x{width} within one "
                "video. Write every chunk at the same size"
            )
        self._size = (height, width)

    def _finish(self, path: Path) -> None:
        """Drain, close, check, rename to `path`; on failure leave nothing behind."""
        try:
            self._join()
            self._raise_if_failed()
            self._check_finished()
            move_into_place(self._temporary, path)
        except BaseException as error:
            self._abandon()
            if isinstance(error, OSError) and error is not self._error:
                raise self._described(error) from error
            raise
        self._unlock()

    def _check_finished(self) -> None:
        """Read the index back: a file that does not open or lacks frames must not get the final name."""
        with av.open(str(self._temporary)) as container:
            stored = container.streams.video[0].frames
        if stored != self._frames:
            raise OSError(errno.EIO, f"the file holds {stored} of {self._frames} frames")

    def _join(self) -> None:
        if self._thread is not None:
            self._queue.put(None)
            self._thread.join()
            self._thread = None

    def _abandon(self) -> None:
        self._abandoned = True
        self._join()
        self._temporary.unlink(missing_ok=True)
        self._unlock()

    def _unlock(self) -> None:
        if self._lock is not None:
            self._lock.close()
            self._lock = None

    def _raise_if_failed(self) -> None:
        if self._error is None:
            return
        if isinstance(self._error, OSError):
            self._error = self._described(self._error)
        raise self._error

    def _described(self, error: OSError) -> OSError:
        """The same failure, in a sentence that says which video, what, and what to do."""
        free = ""
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            with contextlib.suppress(OSError):
                free = f" ({shutil.disk_usage(self.path.parent).free / 2**20:.0f} MiB free there)"
        return OSError(
            error.errno,
            f"{self.path}: could not write this video after {self._frames} frames: {error.strerror or error}{free}. "
            f"{self.remedy}",
        )

    def _encode_all(self) -> None:
        """Body of the encoding thread: one encoder for all chunks, its first error kept for the caller."""
        encoder = None
        while (frames := self._queue.get()) is not None:
            if self._abandoned or self._error is not None:
                continue  # keep taking, so that write() never waits for ever
            try:
                if encoder is None:
                    encoder = _Encoder(self._temporary, frames.shape[1:3], self.fps, self._options)
                for frame in frames:
                    encoder.add(frame)
            except BaseException as error:  # handed over to the thread that writes
                self._error = error
        if encoder is None:
            return
        try:
            encoder.close()
        except BaseException as error:
            self._error = self._error or error


class _Encoder:
    """One libx264 stream in one mp4 container; frames uint8 [H, W, 3] go in one by one."""

    def __init__(self, path: Path, size: tuple[int, int], fps: Fraction, options: dict[str, str]):
        self.container = av.open(str(path), "w", format="mp4", options={"movflags": "+faststart"})
        keyframe = str(max(1, round(fps * KEYFRAME_SECONDS)))
        self.stream = self.container.add_stream("libx264", rate=fps, options={**options, "g": keyframe})
        self.stream.height, self.stream.width = size
        self.stream.pix_fmt = "yuv420p"
        context = self.stream.codec_context
        context.thread_count = ENCODER_THREADS
        context.color_range = LIMITED
        context.colorspace = context.color_primaries = context.color_trc = BT709
        self.time_base = 1 / fps
        self.count = 0

    def add(self, frame: np.ndarray) -> None:
        picture = av.VideoFrame.from_ndarray(frame, format="rgb24").reformat(
            format="yuv420p", dst_colorspace=BT709, src_color_range=FULL, dst_color_range=LIMITED, threads=RGB_THREADS
        )
        picture.pts, picture.time_base = self.count, self.time_base
        self.count += 1
        self.container.mux(self.stream.encode(picture))

    def close(self) -> None:
        try:
            self.container.mux(self.stream.encode(None))
        finally:
            self.container.close()


def read_video(
    path: Path, max_frames: int | None = None, *, last: bool = False, fps: float | None = None
) -> np.ndarray:
    """Decode a video file.

    Args: max_frames keeps the first so many frames, or with `last` the final ones; fps re-times the
        video to that rate by taking, for every tick, the frame shown then (None: every frame as stored).
    Returns: uint8 [T, H, W, 3], upright. Memory grows with the frames kept only.
    Raises: FileNotFoundError; ValueError if the file holds no video that can be decoded.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(errno.ENOENT, f"no such video: {path}. Give the path of a video file")
    if max_frames is not None and max_frames < 1:
        raise ValueError(f"{path}: max_frames={max_frames} keeps nothing. Give at least 1")
    kept: deque[np.ndarray] = deque(maxlen=max_frames if last else None)
    try:
        with av.open(str(path)) as container:
            if not container.streams.video:
                raise ValueError(f"{path}: holds no video stream. Give a video file")
            stream = container.streams.video[0]
            stream.thread_type = "AUTO"
            for picture in _ticks(container.decode(stream), fps):
                kept.append(_rgb(picture))
                if not last and len(kept) == max_frames:
                    break
    except av.FFmpegError as error:
        raise ValueError(f"{path}: cannot be decoded as a video: {error}. Is the file whole?") from error
    if not kept:
        raise ValueError(f"{path}: holds no video frames. Is the file whole?")
    return np.stack(kept)


@dataclass(frozen=True)
class VideoStream:
    """An open video: its size as shown, its rate, and its frames one by one."""

    fps: float
    height: int
    width: int
    frames: Iterator[np.ndarray]  # uint8 [H, W, 3], upright


@contextlib.contextmanager
def open_video(path: Path) -> Iterator[VideoStream]:
    """Decode a video file frame by frame; memory does not grow with it.

    Raises, also from `frames`: FileNotFoundError; ValueError if the file holds no video that can be decoded, is cut
        short, or changes its size on the way.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(errno.ENOENT, f"no such video: {path}. Give the path of a video file")
    try:
        with av.open(str(path)) as container:
            if not container.streams.video:
                raise ValueError(f"{path}: holds no video stream. Give a video file")
            stream = container.streams.video[0]
            stream.thread_type = "AUTO"
            rate = stream.average_rate or stream.guessed_rate
            if not rate:
                raise ValueError(f"{path}: states no frame rate. Convert it to mp4 first")
            frames = _frames(path, container, stream)
            first = next(frames, None)
            if first is None:
                raise ValueError(f"{path}: holds no video frames. Is the file whole?")
            yield VideoStream(float(rate), *first.shape[:2], itertools.chain([first], frames))
    except av.FFmpegError as error:
        raise ValueError(f"{path}: cannot be decoded as a video: {error}. Is the file whole?") from error


def _frames(path: Path, container: av.container.InputContainer, stream: av.VideoStream) -> Iterator[np.ndarray]:
    count, size = 0, None
    for picture in container.decode(stream):
        frame = _rgb(picture)
        if size not in (None, frame.shape):
            raise ValueError(
                f"{path}: frames change from {size[0]}x{size[1]} to {frame.shape[0]}x{frame.shape[1]} at frame "
                f"{count}. Convert it to one size first"
            )
        size, count = frame.shape, count + 1
        yield frame
    if count < stream.frames:
        raise ValueError(f"{path}: only {count} of {stream.frames} frames can be decoded. Is the file whole?")


def _ticks(pictures: Iterator[av.VideoFrame], fps: float | None) -> Iterator[av.VideoFrame]:
    """Frames re-timed to `fps`: tick k shows the newest frame that began by k / fps seconds."""
    if fps is None:
        yield from pictures
        return
    tick, start, shown, duration = 0, None, None, 0.0
    for picture in pictures:
        if picture.time is None:
            raise ValueError("this video has no time stamps, so it cannot be re-timed. Convert it to mp4 first")
        start = picture.time if start is None else start
        while shown is not None and tick / fps < picture.time - start - 1e-6:
            yield shown
            tick += 1
        if shown is not None:
            duration = picture.time - shown.time
        shown = picture
    while shown is not None and tick / fps < shown.time - start + max(duration, 1e-3) - 1e-6:
        yield shown
        tick += 1


def _rgb(picture: av.VideoFrame) -> np.ndarray:
    """uint8 [H, W, 3] of a decoded frame, in its own colour matrix and turned upright."""
    untagged = BT709 if picture.height >= HD_HEIGHT else BT601
    matrix = MATRICES.get(picture.colorspace, untagged)
    image = picture.reformat(
        format="rgb24", src_colorspace=matrix, dst_colorspace=matrix, threads=RGB_THREADS
    ).to_ndarray()
    return np.rot90(image, round(picture.rotation / 90)) if picture.rotation else image


def read_image(path: Path) -> np.ndarray:
    """Read an image, upright, transparency over black. Returns: uint8 [1, H, W, 3].

    Raises: FileNotFoundError; ValueError if it is no image.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(errno.ENOENT, f"no such image: {path}. Give the path of an image file")
    try:
        with Image.open(path) as image:
            image = ImageOps.exif_transpose(image)
            if image.has_transparency_data:
                image = Image.alpha_composite(Image.new("RGBA", image.size, (0, 0, 0, 255)), image.convert("RGBA"))
            return np.array(image.convert("RGB"))[None]
    except (OSError, ValueError, Image.DecompressionBombError) as error:
        raise ValueError(f"{path}: cannot be read as an image: {error}. Is the file whole?") from error


def fit_to(frames: np.ndarray, height: int, width: int) -> np.ndarray:
    """Scale to cover height x width at the same aspect ratio, then cut the centre out.

    Shapes: frames uint8 [T, H, W, 3] -> uint8 [T, height, width, 3]; the same array if it fits already.
    """
    if height < 1 or width < 1:
        raise ValueError(f"cannot fit frames to {height}x{width}. Give a height and width of at least 1")
    if frames.shape[1:3] == (height, width):
        return frames
    fitted = [ImageOps.fit(Image.fromarray(frame), (width, height), Image.Resampling.BICUBIC) for frame in frames]
    return np.stack([np.asarray(image) for image in fitted])
