import numpy as np
import pytest

from raylift.datasets.errors import ConfigError
from raylift.datasets.streaming.order import BatchPartition, SampleOrder


def test_the_order_is_kept_across_versions() -> None:
    """Changing it would make every run that resumes at a checkpoint repeat some samples and leave out others."""
    order = SampleOrder(7, seed=5)
    assert [order.at(p) for p in range(14)] == [3, 6, 2, 4, 5, 0, 1, 2, 0, 6, 1, 5, 4, 3]


def test_epochs_and_seeds_have_orders_of_their_own() -> None:
    def epoch(number: int, seed: int) -> list[int]:
        return [SampleOrder(50, seed).at(50 * number + k) for k in range(50)]

    orders = [tuple(epoch(number, seed)) for number in range(3) for seed in range(3)]
    assert len(set(orders)) == 9


def test_the_order_of_a_million_samples_is_there_at_once() -> None:
    order = SampleOrder(1_000_000, seed=0)
    first = [order.at(p) for p in range(100)]
    assert len(set(first)) == 100
    assert np.mean(first) == pytest.approx(500_000, rel=0.3)


def test_a_worker_takes_whole_micro_batches_separate_from_those_of_the_others() -> None:
    shares = [BatchPartition(rank, 2, global_batch=8, accumulation=2) for rank in range(2)]
    assert [share.micro_batch for share in shares] == [2, 2]
    assert shares[0].positions(16) == [[16, 17], [20, 21]]
    assert shares[1].positions(16) == [[18, 19], [22, 23]]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: SampleOrder(0, 0), "the split is empty"),
        (lambda: SampleOrder(5, -1), "seed -1 is negative"),
        (lambda: BatchPartition(2, 2, 8), "rank 2 is outside 0 to 1"),
        (lambda: BatchPartition(-1, 2, 8), "rank -1 is outside"),
        (
            lambda: BatchPartition(0, 3, 8),
            "8 cannot be divided among 3 workers.*choose a multiple of 3",
        ),
        (lambda: BatchPartition(0, 2, 8, 3), "in 3 micro-batches each: choose a multiple of 6"),
        (lambda: BatchPartition(0, 1, 0), "a global batch of 0"),
        (lambda: BatchPartition(0, 1, 4, 0), "in 0 micro-batches"),
    ],
)
def test_what_cannot_be_shared_out_is_refused(make, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make()
