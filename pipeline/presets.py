"""What lives where: presets that trade speed for memory; only the smallest changes results beyond the order of sums."""
from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class MemoryPreset:
    """One way to use a device's memory."""

    name: str
    shared_window: bool            # one window for all layers, filled again at every pass, in place of one for each
    decoder_latents: int | None    # latent frames that the fast VAE decoder takes a call; None: a chunk's
    encoder_on_host: bool          # prompts are encoded by the processor
    narrow_store: bool             # what is remembered, packets left out, in 8-bit floats: approximate


FULL = MemoryPreset("full", shared_window=False, decoder_latents=None, encoder_on_host=False, narrow_store=False)
PRESETS = {  # from the fastest on
    preset.name: preset for preset in (
        FULL,
        MemoryPreset(
            "24gb", shared_window=True, decoder_latents=None, encoder_on_host=False, narrow_store=False,
        ),
        MemoryPreset("12gb", shared_window=True, decoder_latents=1, encoder_on_host=True, narrow_store=True),
    )
}
NAMES = ("auto", *PRESETS)
