"""What each training stage does, as typed settings; training/tiny.yaml holds the values."""
from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass, field

MAY_BE_NONE = (  # whole numbers, but may be 0
    "seed", "image_steps", "first_chunk_steps", "critic_updates", "sink_frames",
)


@dataclass
class VaeSettings:
    """The video autoencoder."""

    path: str | None = None     # a trained one, such as weights/tiny/vae, in place of this stage
    steps: int = 3000
    image_steps: int = 600      # of them on single frames, before anything moves
    image_batch: int = 96
    batch: int = 16
    latent_frames: int = 5      # of a short clip
    whole_batch: int = 4
    whole_latent_frames: int = 21
    lr: float = 2e-3            # of kernels (Muon)
    lr_rest: float = 1e-3       # of everything else (AdamW)
    ema: float = 0.995
    base_dim: int = 24
    num_res_blocks: int = 1
    edge_weight: float = 2.0    # extra weight of pixels near edges, where shapes are told apart
    gradient_weight: float = 1.0
    kl_weight: float = 1e-6


@dataclass
class DataSettings:
    """The latent clips that teacher and student learn from."""

    clips: int = 24576
    openings: int = 65536       # first chunks alone
    latent_frames: int = 21
    batch: int = 64             # clips rendered and encoded at a time
    openings_batch: int = 512


@dataclass
class TextSettings:
    """The text encoder, trained with the teacher."""

    layers: int = 2
    heads: int = 4
    ffn_dim: int = 256


@dataclass
class TeacherSettings:
    """The causal flow-matching teacher: every chunk denoised at its own level, given the clean ones before it."""

    steps: int = 2700
    batch: int = 48
    first_chunk_steps: int = 2400   # before that: the first chunk alone, where the caption decides everything
    first_chunk_batch: int = 512
    first_chunk_share: int = 96     # extra first chunks beside every batch of clips
    lr: float = 2e-3                # of matrices (Muon)
    lr_rest: float = 1e-3           # of everything else (AdamW)
    ema: float = 0.998
    caption_drop: float = 0.1


@dataclass
class StudentSettings:
    """The few-step student: distribution matching on its own rollouts."""

    steps: int = 150
    batch: int = 48
    first_chunk_share: int = 128    # extra first chunks beside every batch of clips
    lr: float = 1e-4
    lr_critic: float = 2e-4
    critic_updates: int = 3         # per update of the student
    guidance: float = 2.0           # of the teacher
    ema: float = 0.97
    snapshot_every: int = 50        # steps, and at the last one; the best snapshot is what is exported
    choice_captions: int = 192      # unseen captions by which it is chosen


@dataclass
class CompressorSettings:
    """PackForcing's compressor: distribution matching on rollouts that remember packets."""

    steps: int = 300
    batch: int = 24
    latent_frames: int = 21
    sink_frames: int = 3            # few, so that many chunks of a clip become packets
    recent_frames: int = 3
    time_reduction: int = 2
    space_reduction: int = 2
    channels: list[int] = field(default_factory=lambda: [32, 64, 128])  # of the HR branch's stages
    stream: str = "forward"         # or project
    lr_frames: str = "paper"        # or cover
    joint: bool = False             # train the network as well
    lr: float = 1e-4                # of both, where both are trained
    lr_branch: float = 1e-3         # of the branch alone
    lr_critic: float = 2e-4
    critic_updates: int = 3
    guidance: float = 2.0
    ema: float = 0.98
    captions: int = 4096            # of training seeds, drawn from at random


@dataclass
class Settings:
    """Everything that decides a training run besides its data, which is procedural."""

    seed: int = 0
    model: str = "tiny"             # a file stem of configs/models
    chunk_frames: int = 3           # latent frames made at a time; what stages count in frames is whole chunks
    checkpoint_seconds: float = 120.0
    log_every: int = 50
    vae: VaeSettings = field(default_factory=VaeSettings)
    data: DataSettings = field(default_factory=DataSettings)
    text: TextSettings = field(default_factory=TextSettings)
    teacher: TeacherSettings = field(default_factory=TeacherSettings)
    student: StudentSettings = field(default_factory=StudentSettings)
    compressor: CompressorSettings = field(default_factory=CompressorSettings)

    def __post_init__(self) -> None:
        for stage in (self, *(value for value in vars(self).values() if dataclasses.is_dataclass(value))):
            for name, value in vars(stage).items():
                least = 0 if isinstance(value, float | bool) or name in MAY_BE_NONE else 1
                if isinstance(value, int | float) and not (math.isfinite(value) and value >= least):
                    raise ValueError(f"{name}={value} in {type(stage).__name__} must be finite and at least {least}.")
