"""Two ID tables against each other."""

import numpy as np
import pytest

from cladapt.errors import DataError
from cladapt.tokens.churn import Churn
from cladapt.tokens.sids import SidTable

BEFORE = SidTable(("x", "y", "z", "gone"), np.array([[0, 0], [0, 1], [1, 0], [1, 1]]), (2, 2))


def test_shares_are_of_the_items_that_both_have() -> None:
    after = SidTable(("new", "z", "y", "x"), np.array([[1, 1], [0, 0], [0, 0], [0, 0]]), (2, 2), 2)
    found = Churn.between(BEFORE, after)
    assert found.items == ("x", "y", "z")
    assert found.moved.tolist() == [[False, False], [False, True], [True, False]]
    assert found.report() == {
        "items": 3,
        "moved": pytest.approx(2 / 3),
        "levels": [
            {"level": "a", "moved": pytest.approx(1 / 3), "within": pytest.approx(1 / 3)},
            {"level": "b", "moved": pytest.approx(1 / 3), "within": pytest.approx(2 / 3)},
        ],
    }


@pytest.mark.parametrize(
    ("after", "text"),
    [
        (SidTable(("x",), np.array([[0]]), (2,)), "one ID table has 2 levels, the other 1"),
        (SidTable(("w",), np.array([[0, 0]]), (2, 2)), "the two ID tables have no item in common"),
    ],
)
def test_tables_that_cannot_be_compared_are_refused(after: SidTable, text: str) -> None:
    with pytest.raises(DataError, match=text):
        Churn.between(BEFORE, after)
