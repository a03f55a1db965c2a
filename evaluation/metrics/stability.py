"""Visual stability as a vision-language model judges it; which model is up to the user.

`--vlm module:function` names a function (frames uint8 [N, H, W, 3], question) -> answer, such as a call of a hosted
model or of one in transformers. It is asked for the exposure's stability on a scale of 0 to 5, reasons first.

Source: Self Forcing++ and Deep Forcing ask Gemini-2.5-Pro so and report the mean x 20. The wording here is ours, so
the numbers are comparable with each other, not with theirs.
"""
from __future__ import annotations

import importlib
import re
from collections.abc import Callable

import numpy as np

from evaluation.metrics.protocol import NO_PROMPT, CannotMeasureError, Choices, Frame, Metric, Value, VideoInfo
from utils.config import ConfigError

MOST_FRAMES = 32
TO_HUNDRED = 20
QUESTION = """\
You see frames of one generated video in order of time. Judge how stable its exposure is, on this scale:
0: nearly everything is white or black at some time, nothing can be made out
1: large areas lose all detail to white or black
2: clipping that is plain to see and lasts
3: some clipping, limited in area or in time
4: slight flaws that one has to look for
5: well exposed throughout, detail in highlights and shadows
Do not excuse a flaw as style or as a change of scene, unless the prompt asks for it. The prompt was:
{prompt}
Explain what you see first. Then end with a line of the form: Score: <number>
"""

SCORE = re.compile(r"\bscore[\s*_]*(?:\([^()]*\)[\s*_]*)?:[\s*_`<\[]*([+-]?\d+(?:\.\d+)?)", re.IGNORECASE)

Judge = Callable[[np.ndarray, str], str]


class VisualStability(Metric):
    """`visual_stability`: 0 to 100."""

    name = "visual_stability"
    reports = ("visual_stability",)
    gives = ("visual_stability@whole",)

    def __init__(self, judge: Judge, who: str):
        self.judge = judge
        self.protocol = f"exposure 0..5 x 20 as judged by {who}, up to {MOST_FRAMES} frames, prompt as written"

    def start(self, video: VideoInfo) -> VisualStabilityReader:
        if not video.prompt:
            raise CannotMeasureError(NO_PROMPT)
        return VisualStabilityReader(self.judge, video.prompt)


class VisualStabilityReader:
    """Keeps a bounded number of frames, evenly spread: when there are too many, every other one goes."""

    def __init__(self, judge: Judge, prompt: str):
        self.judge, self.prompt = judge, prompt
        self.frames: list[np.ndarray] = []
        self.every = 1

    def add(self, frame: Frame) -> None:
        if frame.index % self.every:
            return
        if len(self.frames) == MOST_FRAMES:
            self.frames = self.frames[::2]
            self.every *= 2
            if frame.index % self.every:
                return
        self.frames.append(frame.rgb)

    def values(self) -> list[Value]:
        answer = self.judge(np.stack(self.frames), QUESTION.format(prompt=self.prompt))
        return [Value("visual_stability", "whole", None, TO_HUNDRED * read_score(answer))]


def read_score(answer: str) -> float:
    """The last `Score: <0..5>` of an answer, a scale in brackets before the colon or not.

    Raises: CannotMeasureError if there is none.
    """
    found = SCORE.findall(answer)
    if not found or not 0 <= float(found[-1]) <= 5:
        raise CannotMeasureError(f"the model gave no score from 0 to 5; its answer ends with {answer[-80:]!r}")
    return float(found[-1])


def visual_stability(choices: Choices) -> VisualStability:
    """Raises ConfigError if `--vlm` is missing or names no function."""
    module, _, function = choices.vlm.partition(":")
    try:
        judge = getattr(importlib.import_module(module), function) if function else None
    except (ImportError, AttributeError, ValueError) as error:
        raise ConfigError(f"--vlm {choices.vlm}: cannot be imported: {error}.") from error
    if not callable(judge):
        raise ConfigError(
            "The metric visual_stability needs --vlm MODULE:FUNCTION, a function (frames uint8 [N, H, W, 3], question) "
            "-> answer. Or leave it out of --metrics."
        )
    return VisualStability(judge, choices.vlm)
