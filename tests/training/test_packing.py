"""Packing by hand: small cases whose answer is seen at once."""

import pytest

from minimax_m1.training.packing import (
    best_fit,
    best_fit_efficiency,
    in_order,
    in_order_efficiency,
    next_batch,
    padded_efficiency,
)


def test_in_order_stops_at_the_first_that_does_not_fit() -> None:
    assert in_order([3, 4, 5, 1], 8) == 2  # the 1 behind the 5 is best fit's business
    assert in_order([3, 4], 8) == 2
    assert in_order([9], 8) == 0


def test_best_fit_takes_the_longest_that_fits_again_and_again() -> None:
    assert best_fit([9, 2, 6, 3, 6, 1], 9) == [0]
    assert best_fit([10, 2, 6, 3, 6, 1], 9) == [2, 3]  # of the two sixes the earlier one
    assert best_fit([10, 10], 9) == []


def test_a_batch_is_the_beginning_and_what_fits_best_behind_it() -> None:
    assert next_batch([3, 4, 5, 1, 3, 2], 10) == [0, 1, 4]
    assert next_batch([3, 4, 5, 1, 1, 1], 10) == [0, 1, 3, 4, 5]
    assert next_batch([3, 4, *[9] * 65, 3], 10) == [0, 1]  # best fit does not look so far


def test_efficiencies() -> None:
    lengths = [6, 5, 4, 6, 1]  # in order, of 10: 6 | 5 4 | 6 1, and the last batch does not count
    assert in_order_efficiency(lengths, 10) == pytest.approx((6 + 9) / 20)
    assert padded_efficiency(lengths, 10) == pytest.approx(22 / (6 + 2 * 5 + 6 + 1))  # 6 | 5 5 | 6 | 1
    assert in_order_efficiency([4], 8) == 0.5
    assert padded_efficiency([], 8) == in_order_efficiency([], 8) == best_fit_efficiency([], 8) == 0.0
    assert best_fit_efficiency([7, 5, 3, 5] * 60, 10) == 1.0
    assert in_order_efficiency([7, 5, 3, 5] * 60, 10) == pytest.approx(2 / 3, abs=0.01)  # 7 | 5 3 | 5 | 7 | …
