"""Pixels, latent frames, tokens, chunks: the only file that divides by strides.

A video of `pixel_frames` pixel frames is `latent_frames` time slices of VAE latent; the first slice
holds one pixel frame, every later one `temporal_stride`. A latent frame is `rows * columns` tokens.
"""
from __future__ import annotations

from dataclasses import dataclass
from itertools import accumulate
from math import ceil

MOST_PIXELS = 2**14  # of a side


@dataclass(frozen=True)
class ChunkSpan:
    """Which latent frames are generated jointly."""

    index: int   # counts from 0, prefilled chunks included
    start: int   # first latent frame
    frames: int  # latent frames in this chunk

    @property
    def stop(self) -> int:
        """One past the last latent frame."""
        return self.start + self.frames


@dataclass(frozen=True)
class PacketGrid:
    """The few tokens that stand for a chunk once it is compressed: a packet.

    Each covers `time` latent frames by `space` x `space` tokens; rows and columns that are left over are not covered.
    """

    chunk_frames: int
    time: int
    space: int
    rows: int
    columns: int

    @property
    def frames(self) -> int:
        """Time slices of a packet; the last one may cover fewer frames."""
        return ceil(self.chunk_frames / self.time)

    @property
    def tokens(self) -> int:
        return self.frames * self.rows * self.columns

    @property
    def centres(self) -> tuple[float, ...]:
        """Middle of the frames that each slice covers, in latent frames from the chunk's first."""
        first = range(0, self.chunk_frames, self.time)
        return tuple((start + min(start + self.time, self.chunk_frames) - 1) / 2 for start in first)


@dataclass(frozen=True, kw_only=True)
class VideoGeometry:
    """Sizes of one video, from pixels to tokens.

    Units: `height`, `width` in pixels; `chunk_frames` in latent frames; `fps` in pixel frames a second.
    Raises:
        ValueError: a size that no whole number of patches covers, or a chunk without frames.
    """

    height: int
    width: int
    fps: int
    chunk_frames: int
    independent_first_frame: bool = False
    patch: tuple[int, int] = (2, 2)
    spatial_stride: int = 8
    temporal_stride: int = 4

    def __post_init__(self) -> None:
        for name, size, patch in (("height", self.height, self.patch[0]), ("width", self.width, self.patch[1])):
            unit = self.spatial_stride * patch
            if size <= 0 or size % unit:
                raise ValueError(
                    f"{name}={size} is not a positive multiple of {unit} pixels "
                    f"(VAE stride {self.spatial_stride} x patch {patch}). Use {max(unit, round(size / unit) * unit)}."
                )
            if size > MOST_PIXELS:
                raise ValueError(f"{name}={size} is more than anything here can hold. Use at most {MOST_PIXELS}.")
        if self.chunk_frames < 1:
            raise ValueError(f"num_frame_per_block={self.chunk_frames}: a chunk needs at least one latent frame.")

    @property
    def latent_height(self) -> int:
        return self.height // self.spatial_stride

    @property
    def latent_width(self) -> int:
        return self.width // self.spatial_stride

    @property
    def rows(self) -> int:
        """Token rows of a latent frame."""
        return self.latent_height // self.patch[0]

    @property
    def columns(self) -> int:
        """Token columns of a latent frame."""
        return self.latent_width // self.patch[1]

    @property
    def frame_tokens(self) -> int:
        """Tokens of one latent frame."""
        return self.rows * self.columns

    def packet_grid(self, *, time: int, space: int) -> PacketGrid:
        """The packet of a whole chunk.

        Raises:
            ValueError: a token would cover less than one, or more than a frame has.
        """
        most = min(self.rows, self.columns)
        if time < 1 or not 1 <= space <= most:
            raise ValueError(
                f"time_reduction={time} and space_reduction={space}: a compressed token of {time} frames by "
                f"{space}x{space} tokens does not fit frames of {self.rows}x{self.columns} tokens. Use a "
                f"time_reduction of at least 1 and a space_reduction of 1 to {most}."
            )
        return PacketGrid(self.chunk_frames, time, space, self.rows // space, self.columns // space)

    def pixel_frames(self, latent_frames: int, *, first: bool = True) -> int:
        """Pixel frames that `latent_frames` decode to; `first` says whether the video starts with them."""
        if latent_frames < 1:
            return 0
        return self.temporal_stride * latent_frames - (self.temporal_stride - 1 if first else 0)

    def latent_frames(self, pixel_frames: int) -> int:
        """Fewest latent frames that decode to at least `pixel_frames` pixel frames."""
        return ceil((pixel_frames - 1) / self.temporal_stride) + 1

    def frame_at(self, seconds: float) -> int:
        """The latent frame that holds the pixel frame shown at `seconds`."""
        return self.latent_frames(round(seconds * self.fps) + 1) - 1

    def pixel_frames_of_seconds(self, seconds: float) -> int:
        """Pixel frames of a video of `seconds`, at least one."""
        return max(1, round(seconds * self.fps))

    def whole_chunks(self, latent_frames: int, *, prefilled: int = 0) -> int:
        """`latent_frames` rounded up so that what follows `prefilled` frames is whole chunks."""
        head = prefilled or (1 if self.independent_first_frame else 0)
        rest = max(0, latent_frames - head)
        return head + ceil(rest / self.chunk_frames) * self.chunk_frames

    def prefill_chunks(self, latent_frames: int) -> list[ChunkSpan]:
        """How given frames (an image, a clip to continue) enter the memory: any odd rest comes first."""
        return self._spans(latent_frames, index=0, start=0)

    def chunks(self, latent_frames: int, *, prefilled: int = 0) -> list[ChunkSpan]:
        """Chunks to generate after `prefilled` frames, for a video of `latent_frames` in all.

        Raises:
            ValueError: `latent_frames` leaves part of a chunk over; round with `whole_chunks` first.
        """
        if latent_frames <= prefilled or latent_frames != self.whole_chunks(latent_frames, prefilled=prefilled):
            longer = self.whole_chunks(max(latent_frames, prefilled + 1), prefilled=prefilled)
            raise ValueError(
                f"{latent_frames} latent frames after {prefilled} given ones are not whole chunks of "
                f"{self.chunk_frames}; the next length that is: {longer}."
            )
        return self._spans(latent_frames - prefilled, index=len(self.prefill_chunks(prefilled)), start=prefilled)

    def _spans(self, latent_frames: int, *, index: int, start: int) -> list[ChunkSpan]:
        """So many frames from `start` on: an independent first one, an odd rest, then whole chunks."""
        alone = 1 if self.independent_first_frame and latent_frames and not start else 0
        whole, rest = divmod(latent_frames - alone, self.chunk_frames)
        sizes = [frames for frames in (alone, rest, *[self.chunk_frames] * whole) if frames]
        starts = accumulate(sizes[:-1], initial=start)
        return [ChunkSpan(index + i, *span) for i, span in enumerate(zip(starts, sizes, strict=False))]
