"""What a run reads follows from what its loss looks at."""

from dataclasses import replace

import pytest

from raylift.datasets.archive import Archive
from raylift.datasets.order import Share
from raylift.platform.checkpoint import State
from raylift.platform.train import open_stream


@pytest.mark.parametrize("lung", [0.0, 10.0])
def test_labels_are_read_for_a_loss_inside_the_lungs_and_only_then(tiny, archive32, lung):
    run = replace(tiny, system=replace(tiny.system, loss=replace(tiny.system.loss, lung=lung)))
    stream = open_stream(Archive(str(archive32)), run, Share(0, 1, 4, 1), State(0, 0, {}))
    (batch,) = next(iter(stream))
    assert (batch.labels is not None) == (lung > 0)
    if lung:
        assert batch.labels.shape == batch.volume.shape
        assert batch.labels.any()
