import math

import polars as pl
import pytest

from cladapt.errors import DataError
from cladapt.eval.continual import (
    Matrix,
    average,
    backward_transfer,
    forward_transfer,
    left_out,
    plasticity,
    summaries,
)


def matrix(cells: dict[tuple[int, int], float], base: int = 1, learned: frozenset[tuple[int, int]] = frozenset()):
    frame = pl.DataFrame({"model_block": [t for t, _ in cells], "block": [s for _, s in cells], "HR": cells.values()})
    return Matrix.build(frame, "HR", base, learned)


FULL = {
    (1, 1): 0.50, (1, 2): 0.20, (1, 3): 0.10, (1, 4): 0.10,
    (2, 1): 0.45, (2, 2): 0.40, (2, 3): 0.15, (2, 4): 0.12,
    (3, 1): 0.40, (3, 2): 0.35, (3, 3): 0.30, (3, 4): 0.18,
    (4, 1): 0.30, (4, 2): 0.30, (4, 3): 0.28, (4, 4): 0.35,
}  # fmt: skip


def test_the_matrix_has_each_cell_in_its_place_whatever_the_row_order():
    shuffled = matrix(dict(reversed(FULL.items())))
    assert shuffled.model_blocks == shuffled.blocks == (1, 2, 3, 4)
    assert all(shuffled[t, s] == value for (t, s), value in FULL.items())
    assert shuffled.adapted == (2, 3, 4)
    assert math.isnan(shuffled[9, 1])


def test_summaries_by_hand():
    r = matrix(FULL)
    assert average(r).value == pytest.approx((0.40 + 0.30 + 0.35) / 3)
    assert backward_transfer(r).value == pytest.approx(((0.30 - 0.50) + (0.30 - 0.40) + (0.28 - 0.30)) / 3)
    assert forward_transfer(r).value == pytest.approx(((0.15 - 0.10) + (0.18 - 0.10)) / 2)
    assert plasticity(r).value == pytest.approx(((0.40 - 0.20) + (0.30 - 0.15) + (0.35 - 0.18)) / 3)
    assert all(mean.missing == 0 for mean in summaries(r).values())


def test_a_model_that_never_changes_neither_forgets_nor_transfers():
    frozen = matrix({(t, s): 0.1 * s for t in range(1, 5) for s in range(1, 5)})
    assert average(frozen).value == pytest.approx(0.3)
    for summary in (backward_transfer, forward_transfer, plasticity):
        assert summary(frozen).value == pytest.approx(0.0)


def test_without_the_base_row_what_needs_it_is_missing():
    r = matrix({cell: value for cell, value in FULL.items() if cell[0] != 1})
    assert average(r).used == 3
    assert plasticity(r).value == pytest.approx(((0.30 - 0.15) + (0.35 - 0.18)) / 2)
    assert (plasticity(r).used, plasticity(r).missing) == (2, 1)
    assert math.isnan(forward_transfer(r).value)
    assert (forward_transfer(r).used, forward_transfer(r).missing) == (0, 2)


def test_an_unmeasured_cell_leaves_its_term_out_and_is_counted():
    r = matrix({cell: value for cell, value in FULL.items() if cell != (4, 2)})
    assert backward_transfer(r).value == pytest.approx(((0.30 - 0.50) + (0.28 - 0.30)) / 2)
    assert (backward_transfer(r).used, backward_transfer(r).missing) == (2, 1)


def test_a_cell_that_was_learned_is_no_part_of_backward_transfer_and_the_reason_is_said():
    r = matrix(FULL, learned=frozenset({(4, 1), (4, 3), (3, 2)}))
    assert backward_transfer(r).value == pytest.approx(0.30 - 0.40)
    assert (backward_transfer(r).used, backward_transfer(r).missing) == (1, 0)
    assert left_out(r) == (
        "backward transfer without block 1, 3: the last model has learned the held-out events there "
        "(train.held_out=next), so its figure is no test"
    )
    whole = matrix(FULL)
    assert left_out(whole) == ""
    for summary in (average, forward_transfer, plasticity):
        assert summary(r) == summary(whole)


def test_a_null_metric_is_an_unmeasured_cell():
    frame = pl.DataFrame({"model_block": [2], "block": [2], "log_likelihood": [None]})
    mean = average(Matrix.build(frame, "log_likelihood", base=1))
    assert math.isnan(mean.value)
    assert (mean.used, mean.missing) == (0, 1)


def test_a_base_that_saw_no_block_is_row_zero():
    r = matrix({(0, 1): 0.1, (0, 2): 0.1, (1, 1): 0.3, (1, 2): 0.2, (2, 1): 0.3, (2, 2): 0.4}, base=0)
    assert average(r).value == pytest.approx(0.35)
    assert forward_transfer(r).value == pytest.approx(0.1)
    # there is no block 0, so R[0][0] is not a missing cell
    assert backward_transfer(r).value == pytest.approx(0.0)
    assert (backward_transfer(r).used, backward_transfer(r).missing) == (1, 0)


def test_an_empty_summary_gives_empty_means():
    empty = Matrix.build(pl.DataFrame(schema={"model_block": pl.Int32, "block": pl.Int32, "HR": pl.Float64}), "HR", 1)
    assert all(mean.used == 0 for mean in summaries(empty).values())


def test_two_rows_for_a_cell_are_refused():
    frame = pl.DataFrame({"model_block": [2, 2], "block": [3, 3], "seed": [0, 1], "HR": [0.1, 0.2]})
    with pytest.raises(DataError, match=r"R\[2\]\[3\] has several rows"):
        Matrix.build(frame, "HR", base=1)


def test_an_unknown_metric_is_refused():
    with pytest.raises(DataError, match="lacks the column 'HR@7'"):
        Matrix.build(pl.DataFrame({"model_block": [2], "block": [3], "HR@5": [0.1]}), "HR@7", base=1)
