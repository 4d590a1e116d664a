"""An entry of an archive: where a sample is, what its arrays must be, and how it was made."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from raylift.datasets.archive.splits import Split


@dataclass(frozen=True)
class Entry:
    """One sample of an archive."""

    id: str
    subject: str
    source: str
    """Name of the source file or series, without its folder."""
    source_sha256: str
    license: str
    label_method: Literal["threshold", "network", "phantom", "none"]
    record: dict[str, Any]
    """Provenance: a scan's original size, spacing and orientation, a phantom's seed, or a radiograph's orientation."""
    split: Split = "train"
    part: str = ""
    index: int = -1
    sha256: dict[str, str] = field(default_factory=dict)

    @property
    def has_field_of_view_mask(self) -> bool:
        """Whether any voxel of its labels is `Label.OUTSIDE_FIELD_OF_VIEW`."""
        record = self.record
        # Records of an earlier raylift lack the fraction.
        return record.get("beyond_field_of_view") == "mask" and record.get("masked_fraction") != 0
