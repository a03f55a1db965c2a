"""Known damage to known videos, each of a strength: what the analysers must notice, and in proportion.

Every function takes and returns uint8 frames [T, H, W, 3]; strength 0 changes nothing.
"""
from __future__ import annotations

import io

import numpy as np
from PIL import Image

JPEG_QUALITY = 80


def blur(frames: np.ndarray, sigma: float) -> np.ndarray:
    """Gaussian blur of `sigma` pixels."""
    if sigma <= 0:
        return frames
    reach = max(1, int(np.ceil(3 * sigma)))
    kernel = np.exp(-0.5 * (np.arange(-reach, reach + 1) / sigma) ** 2).astype(np.float32)
    values = frames.astype(np.float32)
    for axis in (1, 2):
        pad = [(0, 0)] * 4
        pad[axis] = (reach, reach)
        wide, length = np.pad(values, pad, mode="edge"), values.shape[axis]
        parts = [
            wide[:, shift:shift + length] if axis == 1 else wide[:, :, shift:shift + length]
            for shift in range(len(kernel))
        ]
        values = sum(weight * part for weight, part in zip(kernel / kernel.sum(), parts, strict=True))
    return _bytes(values)


def noise(frames: np.ndarray, deviation: float, seed: int = 0) -> np.ndarray:
    """Gaussian noise of `deviation` in levels of 255, new in every frame."""
    rng = np.random.default_rng(seed)
    return _bytes(frames + rng.normal(0, deviation, frames.shape).astype(np.float32)) if deviation > 0 else frames


def compress(frames: np.ndarray, quality: int = JPEG_QUALITY) -> np.ndarray:
    """Each frame through JPEG."""
    out = []
    for frame in frames:
        with io.BytesIO() as buffer:
            Image.fromarray(frame).save(buffer, "JPEG", quality=quality)
            out.append(np.asarray(Image.open(buffer).convert("RGB")))
    return np.stack(out)


def as_generated(frames: np.ndarray, seed: int = 0) -> np.ndarray:
    """What a decoder does to any video at best: a little blur, a little noise, some quantisation."""
    return compress(noise(blur(frames, 0.8), 4.0, seed))


def hue_ramp(frames: np.ndarray, degrees: float) -> np.ndarray:
    """Turn all hues, from none in the first frame to `degrees` in the last."""
    axis = np.full((3, 3), 1 / 3)
    cross = np.array([[0, -1, 1], [1, 0, -1], [-1, 1, 0]]) / np.sqrt(3)
    out = np.empty_like(frames)
    for index, frame in enumerate(frames):
        angle = np.deg2rad(degrees) * index / max(1, len(frames) - 1)
        turn = np.cos(angle) * np.eye(3) + np.sin(angle) * cross + (1 - np.cos(angle)) * axis
        out[index] = _bytes(frame @ turn.T)
    return out


def cross_fade(frames: np.ndarray, other: np.ndarray) -> np.ndarray:
    """From the first video to the second, evenly over time."""
    share = np.linspace(0, 1, len(frames), dtype=np.float32)[:, None, None, None]
    return _bytes(frames * (1 - share) + other * share)


def switch(frames: np.ndarray, other: np.ndarray, share: float) -> np.ndarray:
    """The last `share` of the frames taken from the second video."""
    keep = len(frames) - round(share * len(frames))
    return np.concatenate([frames[:keep], other[keep:]])


def freeze(frames: np.ndarray, share: float) -> np.ndarray:
    """The last `share` of the frames stand still."""
    keep = max(1, len(frames) - round(share * len(frames)))
    return np.concatenate([frames[:keep], np.repeat(frames[keep - 1:keep], len(frames) - keep, 0)])


def jump_cuts(frames: np.ndarray, cuts: int, skip: int) -> np.ndarray:
    """Leave out `skip` frames at each of `cuts` places, evenly spread. Shorter by cuts * skip."""
    places = (np.arange(1, cuts + 1) * len(frames) / (cuts + 1)).astype(int)
    left_out = {place + offset for place in places for offset in range(skip)}
    return frames[[index for index in range(len(frames)) if index not in left_out]]


def loop_backs(frames: np.ndarray, times: int) -> np.ndarray:
    """Start anew `times` times, after equal stretches. As long as before."""
    stretch = -(-len(frames) // (times + 1))
    return frames[np.arange(len(frames)) % stretch]


def chunk_flicker(frames: np.ndarray, levels: float, first: int = 9, chunk: int = 12) -> np.ndarray:
    """Every other chunk brighter by `levels` of 255."""
    number = np.maximum(0, (np.arange(len(frames)) - first) // chunk + 1)
    return _bytes(frames + levels * (number % 2)[:, None, None, None])


def _bytes(values: np.ndarray) -> np.ndarray:
    return np.clip(np.round(values), 0, 255).astype(np.uint8)
