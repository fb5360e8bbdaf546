"""What differs between two ID tables of the same items."""

import string
from dataclasses import dataclass
from typing import Any

import numpy as np

from cladapt.errors import DataError
from cladapt.tokens.sids import SidTable


@dataclass(frozen=True, eq=False)
class Churn:
    """The items that both tables have, in the order of the first, and where their codes differ.

    `moved`: bool [items, levels], whether an item has another code at a level.
    """

    items: tuple[str, ...]
    moved: np.ndarray

    @classmethod
    def between(cls, before: SidTable, after: SidTable) -> "Churn":
        """Compare two tables; `DataError` where they differ in the number of levels, or have no item in common."""
        if before.levels != after.levels:
            raise DataError(
                f"one ID table has {before.levels} levels, the other {after.levels}: their codes cannot be compared",
                "compare two versions of one stream",
            )
        known = {*after.items}
        both = [item for item in before.items if item in known]
        if not both:
            raise DataError("the two ID tables have no item in common", "compare two versions of one stream")
        return cls(tuple(both), before.align(both).codes != after.align(both).codes)

    def report(self) -> dict[str, Any]:
        """Share of the items that have another ID, and level by level that have another code there.

        `within`: of a level, the share that has another code there or above it, so another prefix up to it.
        """
        within = np.logical_or.accumulate(self.moved, axis=1).mean(axis=0)
        levels = zip(string.ascii_lowercase, self.moved.mean(axis=0).tolist(), within.tolist(), strict=False)
        return {
            "items": len(self.items),
            "moved": float(self.moved.any(axis=1).mean()),
            "levels": [{"level": level, "moved": moved, "within": prefix} for level, moved, prefix in levels],
        }
