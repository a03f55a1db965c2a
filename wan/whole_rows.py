"""A choice that torch's compiler leaves open: reductions that hold a whole row and read it once."""
from __future__ import annotations

from typing import Any

from torch._inductor.choices import InductorChoices
from torch._inductor.runtime.hints import ReductionHint
from torch._inductor.virtualized import V

ROW = 4096  # values; the compiler's own limit is below the 1,536 channels of a token


class _WholeRows(InductorChoices):
    @staticmethod
    def should_use_persistent_reduction(features: Any, *others: Any) -> bool:
        return InductorChoices.should_use_persistent_reduction(features, *others) or (
            features.get_reduction_hint() == ReductionHint.INNER
            and V.graph.sizevars.statically_known_leq(features.reduction_numel, ROW)
        )


def prefer_whole_rows() -> None:
    """For all that this thread compiles from now on."""
    V.set_choices_handler(_WholeRows())
