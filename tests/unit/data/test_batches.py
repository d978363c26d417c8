"""Batches: each example once per epoch, in an order set by (seed, epoch), grouped for the least padding."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tunesmith.data.batches import Batches, Limits, Ragged, collate, cut
from tunesmith.data.encoded import Encoded, encode

NO_LIMITS = Limits(10**9, 10**9)
LENGTHS = [7, 1, 30, 4, 4, 12, 2, 9, 5, 16, 3, 8, 1]


@pytest.fixture
def encoded(tmp_path: Path) -> Encoded:
    """Thirteen examples of unequal length; each token is the number of its example."""
    rows = [{"input_ids": [number] * size, "label": number} for number, size in enumerate(LENGTHS)]
    return encode(rows, lambda chunk: chunk, tmp_path / "encoded", lambda data: data.lengths("input_ids"))


def _seen(batches: Batches, start: int, stop: int, limits: Limits = NO_LIMITS) -> list[list[list[int]]]:
    """Return for each step its micro-batches, as lists of example numbers."""
    return [[micro.tolist() for micro in batches.micro_batches(step, limits)] for step in range(start, stop)]


def _flat(steps: list[list[list[int]]]) -> list[int]:
    return [example for step in steps for micro in step for example in micro]


@pytest.mark.parametrize("batch_size", (1, 4, 5, 13, 50))
@pytest.mark.parametrize("world", (1, 2, 3))
def test_all_examples_are_seen_once_an_epoch_over_all_processes(encoded: Encoded, batch_size: int, world: int) -> None:
    ranks = [Batches(encoded, batch_size, 0, rank, world) for rank in range(world)]
    steps = ranks[0].steps_per_epoch
    assert steps == -(-13 // batch_size)
    for epoch in range(3):
        seen = [_seen(rank, epoch * steps, (epoch + 1) * steps, Limits(3, 40)) for rank in ranks]
        assert sorted(example for rank in seen for example in _flat(rank)) == list(range(13))
        for within in range(steps):  # each step holds batch_size examples, in shares that differ by one at most
            shares = [len(_flat([rank[within]])) for rank in seen]
            assert sum(shares) == min(batch_size, 13 - within * batch_size) and max(shares) - min(shares) <= 1


@pytest.mark.parametrize("world", (1, 2, 3, 20))
def test_a_step_holds_the_same_examples_on_any_number_of_processes(encoded: Encoded, world: int) -> None:
    alone = Batches(encoded, 5, 3)
    for step in range(6):
        together = [
            example
            for rank in range(world)
            for example in _flat(_seen(Batches(encoded, 5, 3, rank, world), step, step + 1))
        ]
        assert sorted(together) == sorted(alone.indices(step).tolist())


def test_the_order_is_a_function_of_seed_and_epoch(encoded: Encoded) -> None:
    orders = {
        (seed, epoch): tuple(Batches(encoded, 13, seed).indices(epoch).tolist())
        for seed in range(4)
        for epoch in range(4)
    }
    assert len(set(orders.values())) == 16, "each seed and each epoch has its own"
    np.random.seed(0)
    torch.manual_seed(0)
    for (seed, epoch), order in orders.items():
        np.random.rand()
        assert tuple(Batches(encoded, 13, seed).indices(epoch).tolist()) == order
        by_fives = Batches(encoded, 5, seed)
        assert [e for step in range(3) for e in by_fives.indices(3 * epoch + step).tolist()] == list(order)


def test_every_place_of_the_order_is_as_likely_for_every_example(encoded: Encoded) -> None:
    first = np.array([Batches(encoded, 13, 0).indices(epoch) for epoch in range(2600)])
    counts = np.stack([np.bincount(first[:, place], minlength=13) for place in range(13)])
    assert np.abs(counts - 200).max() < 5 * 200**0.5


def test_a_run_can_go_on_at_any_step(encoded: Encoded) -> None:
    limits = Limits(3, 30, 4)
    whole = _seen(Batches(encoded, 4, 7), 0, 12, limits)
    for step in range(12):
        assert _seen(Batches(encoded, 4, 7), step, 12, limits) == whole[step:]


def test_inside_of_a_step_examples_are_sorted_by_length(encoded: Encoded) -> None:
    for step in _seen(Batches(encoded, 6, 1), 0, 9, Limits(2, 1000)):
        lengths = [LENGTHS[example] for micro in step for example in micro]
        assert lengths == sorted(lengths) and all(len(micro) <= 2 for micro in step)


def _cost(lengths: Any, runs: list[tuple[int, int]], limits: Limits) -> int:
    return sum((stop - start) * lengths[stop - 1] + limits.overhead for start, stop in runs)


def _fits(lengths: Any, run: tuple[int, int], limits: Limits) -> bool:
    rows = run[1] - run[0]
    return rows == 1 or (rows <= limits.max_examples and rows * lengths[run[1] - 1] <= limits.max_cost)


def _groupings(items: list[int]) -> Iterator[list[list[int]]]:
    """Return all partitions of the items into groups."""
    if not items:
        yield []
        return
    for rest in _groupings(items[1:]):
        yield [[items[0]], *rest]
        for index, group in enumerate(rest):
            yield [*rest[:index], [items[0], *group], *rest[index + 1 :]]


@given(
    lengths=st.lists(st.integers(1, 20), min_size=1, max_size=6).map(sorted),
    max_examples=st.integers(1, 7),
    max_cost=st.integers(1, 60),
    overhead=st.integers(0, 25),
)
@settings(max_examples=150, deadline=None, derandomize=True)
def test_no_other_grouping_costs_less(lengths: list[int], max_examples: int, max_cost: int, overhead: int) -> None:
    limits = Limits(max_examples, max_cost, overhead)
    runs = cut(np.array(lengths), limits)
    assert [place for start, stop in runs for place in range(start, stop)] == list(range(len(lengths)))
    assert all(_fits(lengths, run, limits) for run in runs)
    least = min(
        sum(len(group) * max(group) + overhead for group in groups)
        for groups in _groupings(lengths)
        if all(_fits(sorted(group), (0, len(group)), limits) for group in groups)
    )
    assert _cost(lengths, runs, limits) == least


def test_a_row_beyond_the_limit_stands_alone_and_nothing_is_cut_from_nothing() -> None:
    assert cut(np.array([3, 4, 100]), Limits(8, 10, 5)) == [(0, 2), (2, 3)]
    assert cut(np.array([], dtype=np.int64), Limits(8, 10)) == []
    assert cut(np.array([0, 0, 5]), Limits(8, 10, 1)) == [(0, 2), (2, 3)]


def test_a_batch_holds_the_fields_of_its_examples(encoded: Encoded) -> None:
    batch = collate(encoded, np.array([5, 1, 3]))
    assert batch.size == 3 and encoded.costs[[5, 1, 3]].tolist() == [12, 1, 4]
    assert "label" in batch and "other" not in batch
    assert batch.tensor("label").tolist() == [5, 1, 3] and batch.tensor("label").dtype == torch.int64
    rows = batch.ragged("input_ids")
    assert rows.lengths.tolist() == [12, 1, 4] and rows.offsets.tolist() == [0, 12, 13, 17]
    for wrong in (lambda: batch.ragged("label"), lambda: batch.tensor("input_ids")):
        with pytest.raises(AssertionError):
            wrong()
    moved = batch.to(torch.device("meta"))
    assert moved.ragged("input_ids").values.device.type == "meta" == moved.tensor("label").device.type


def test_ragged_rows_are_padded_on_the_right() -> None:
    rows = Ragged(torch.tensor([1, 2, 3, 4, 5, 6]), torch.tensor([0, 3, 3, 4, 6]))
    assert rows.padded(0).tolist() == [[1, 2, 3], [0, 0, 0], [4, 0, 0], [5, 6, 0]]
    assert rows.padded(9).tolist() == [[1, 2, 3], [9, 9, 9], [4, 9, 9], [5, 6, 9]]
    assert rows.mask().tolist() == [[1, 1, 1], [0, 0, 0], [1, 0, 0], [1, 1, 0]]
    assert Ragged(torch.tensor([0.5, 1.5]), torch.tensor([0, 2])).padded(-1.0).tolist() == [[0.5, 1.5]]
