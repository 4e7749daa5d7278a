"""The order of rows, as arithmetic: every row once a pass, whatever the sizes; the same whatever the workers."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from distrecon.errors import UserError
from distrecon.zoos.order import Order, spans


@st.composite
def orders(draw: st.DrawFn) -> Order:
    lanes = draw(st.sampled_from([1, 2, 4, 8]))
    sizes = draw(st.lists(st.integers(1, 9), min_size=1, max_size=12))
    gaps = draw(st.lists(st.integers(0, 5), min_size=len(sizes), max_size=len(sizes)))
    first, groups = 0, []
    for rows, gap in zip(sizes, gaps, strict=True):  # gaps: rows of other splits in between
        groups.append((first + gap, rows))
        first += gap + rows
    per_lane, window = draw(st.integers(1, 3)), draw(st.integers(1, 4))
    return Order(spans(groups), lanes * per_lane, lanes, window, (draw(st.integers(0, 99)),))


def steps(order: Order, number: int, rank: int, world_size: int) -> list[np.ndarray]:
    return [step for w in range(order.windows) for step in order.window(number, w, rank, world_size)]


@settings(max_examples=60, deadline=None)
@given(order=orders(), number=st.integers(0, 3))
def test_every_row_appears_once_a_pass_and_workers_make_no_difference(order: Order, number: int) -> None:
    every = np.concatenate([np.arange(first, first + rows) for first, rows in order.spans_G2])
    alone = steps(order, number, 0, 1)
    assert np.array_equal(np.sort(np.concatenate(alone)), every)
    assert len(alone) == order.steps
    assert all(len(step) == order.batch_size for step in alone[:-1])
    for world_size in [w for w in (2, 4, 8) if order.lanes % w == 0]:
        shares = [steps(order, number, rank, world_size) for rank in range(world_size)]
        for s, step in enumerate(alone):
            assert np.array_equal(np.concatenate([share[s] for share in shares]), step)
            assert [len(share[s]) for share in shares] == [
                sum(order.sizes(s)[i] for i in order.owned(r, world_size)) for r in range(world_size)
            ]


@settings(max_examples=30, deadline=None)
@given(order=orders())
def test_a_worker_sees_its_own_rows_in_every_pass(order: Order) -> None:
    for rank in range(order.lanes):
        own = order.lane_rows(rank)
        for number in (0, 1):
            seen = np.concatenate([np.empty(0, np.int64), *steps(order, number, rank, order.lanes)])
            assert np.array_equal(np.sort(seen), own)


def test_passes_and_seeds_differ_and_rows_are_mixed() -> None:
    big = Order(spans([(i * 50, 50) for i in range(40)]), 64, 16, 100, (0, 1))
    first, second = (np.concatenate(steps(big, number, 0, 1)) for number in (0, 1))
    other = np.concatenate(steps(Order(big.spans_G2, 64, 16, 100, (1, 1)), 0, 0, 1))
    assert not np.array_equal(first, second)
    assert not np.array_equal(first, other)
    lane = np.concatenate([step[:4] for step in steps(big, 0, 0, 1)])  # rows of the first lane, in their order
    assert abs(np.corrcoef(lane, np.arange(len(lane)))[0, 1]) < 0.3


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: Order(spans([(0, 9)]), 10, 4, 1, (0,)), "10 is not a multiple of the 4"),
        (lambda: Order(spans([(0, 9)]), 8, 4, 1, (0,)).owned(0, 5), "worker 0 of 5: there are only 4"),
        (lambda: Order(spans([(0, 9)]), 8, 4, 1, (0,)).owned(2, 2), "worker 2 of 2"),
    ],
)
def test_sizes_that_do_not_divide_are_refused(call, message: str) -> None:
    with pytest.raises(UserError, match=message):
        call()


def shape(rows: np.ndarray) -> list[int]:
    """An order without regard to which rows are ordered."""
    return rows.argsort().tolist()


def test_no_two_passes_windows_lanes_or_keys_share_an_order() -> None:
    whole = spans([(i * 32, 32) for i in range(256)])

    def window(number: int = 0, window: int = 0, lane: int = 0, key: tuple[int, ...] = (0, 1, 0)) -> np.ndarray:
        return Order(whole, 16, 4, 8, key).lane_window(lane, number, window)

    first = window()
    assert np.array_equal(first, window())
    others = {
        "pass": window(number=1),
        "window": window(window=1),
        "lane": window(lane=1),
        "seed": window(key=(1, 1, 0)),
        "zoo": window(key=(0, 1, 1)),
    }
    for name, other in others.items():
        assert len(other) == len(first), name
        assert shape(other) != shape(first), name  # the order of the rows
        assert set(other) != set(first), name  # and which of them come
