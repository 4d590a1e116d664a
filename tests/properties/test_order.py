"""Sample order for any number of samples, workers and micro-batches: nothing lost, nothing repeated."""

from collections import Counter

from hypothesis import given
from hypothesis import strategies as st

from raylift.datasets.streaming.order import BatchPartition, SampleOrder

orders = st.builds(SampleOrder, st.integers(1, 60), st.integers(0, 2**63))


@st.composite
def shared(draw: st.DrawFn) -> tuple[int, int, int]:
    """A global batch with a number of workers and of micro-batches that divide it."""
    world, accumulation, micro = draw(st.integers(1, 8)), draw(st.integers(1, 4)), draw(st.integers(1, 4))
    return world * accumulation * micro, world, accumulation


def taken(order: SampleOrder, start: int, batch: int, world: int, accumulation: int) -> list[int]:
    """The samples of one global batch, over all workers."""
    shares = [BatchPartition(rank, world, batch, accumulation) for rank in range(world)]
    positions = [p for share in shares for micro in share.positions(start) for p in micro]
    return [order.at(p) for p in sorted(positions)]


@given(orders, st.integers(0, 50))
def test_every_epoch_is_a_permutation(order: SampleOrder, epoch: int) -> None:
    samples = [order.at(order.count * epoch + k) for k in range(order.count)]
    assert sorted(samples) == list(range(order.count))


@given(orders, st.integers(0, 10_000))
def test_a_position_has_its_sample_whatever_was_read_before(order: SampleOrder, position: int) -> None:
    alone = SampleOrder(order.count, order.seed).at(position)
    for before in range(max(0, position - 5), position):
        order.at(before)
    assert order.at(position) == alone


@given(shared(), st.integers(0, 1000))
def test_workers_share_out_a_global_batch_without_gap_or_overlap(sharing: tuple[int, int, int], start: int) -> None:
    batch, world, accumulation = sharing
    shares = [BatchPartition(rank, world, batch, accumulation) for rank in range(world)]
    parts = [share.positions(start) for share in shares]
    assert all(len(part) == accumulation for part in parts)
    assert {len(micro) for part in parts for micro in part} == {batch // world // accumulation}
    assert sorted(p for part in parts for micro in part for p in micro) == list(range(start, start + batch))


@given(orders, shared(), st.data())
def test_any_number_of_workers_makes_the_same_global_batches(
    order: SampleOrder, sharing: tuple[int, int, int], data: st.DataObject
) -> None:
    batch, world, accumulation = sharing
    others = [n for n in range(1, batch + 1) if batch % n == 0]
    other = data.draw(st.sampled_from(others))
    for step in range(4):
        mine = taken(order, step * batch, batch, world, accumulation)
        assert taken(order, step * batch, batch, other, 1) == mine


@given(orders, shared(), st.integers(0, 6), st.data())
def test_going_on_anywhere_with_any_number_of_workers_loses_and_repeats_nothing(
    order: SampleOrder, sharing: tuple[int, int, int], steps: int, data: st.DataObject
) -> None:
    batch, world, accumulation = sharing
    stop = data.draw(st.integers(0, steps))
    other = data.draw(st.sampled_from([n for n in range(1, batch + 1) if batch % n == 0]))
    seen: Counter[int] = Counter()
    for step in range(steps):
        sizes = (world, accumulation) if step < stop else (other, 1)
        seen.update(taken(order, step * batch, batch, *sizes))
    straight = Counter(order.at(p) for p in range(steps * batch))
    assert seen == straight
    assert max(seen.values(), default=0) - min((seen[k] for k in range(order.count)), default=0) <= 1
