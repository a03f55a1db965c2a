"""Reading videos of the embedded model's world without any network.

    analysis = analyse(frames, truth)     # uint8 [T, H, W, 3] and what they should show
    analysis.video.holds["colour"]        # true if every named colour is there in 80 % of the frames
    analysis.between(55, 60)              # means of every per-frame value over a window in seconds
    curves(analysis)                      # one value a second

`python -m evaluation.analysers.selfcheck` measures the analysers on rendered clips, where the truth is known.
"""
from evaluation.analysers.judge import PROPERTIES, Analysis, PerFrame, PerVideo, analyse, chance, curves, judge
from evaluation.analysers.observe import Observation, observe
from evaluation.analysers.stability import ChunkLayout

__all__ = [
    "PROPERTIES", "Analysis", "ChunkLayout", "Observation", "PerFrame", "PerVideo", "analyse", "chance", "curves",
    "judge", "observe",
]
