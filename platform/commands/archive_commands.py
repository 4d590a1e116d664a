"""`raylift archive ls`, `raylift archive verify` and `raylift archive merge`: list, verify and merge archives."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from raylift.datasets.archive.archive import Archive
from raylift.datasets.archive.entry import Entry
from raylift.datasets.archive.merging import merge
from raylift.datasets.archive.splits import SPLITS
from raylift.datasets.archive.store import Folder, absolute
from raylift.datasets.archive.verification import verify
from raylift.datasets.errors import ArchiveError, ArchiveNotFoundError, ConfigError, StoreError
from raylift.datasets.serialization import to_plain
from raylift.platform.progress import progress_bar

INGEST_OPTIONS = ("license", "label_method", "segmenter", "beyond_field_of_view", "table_removed")
"""What was chosen at ingest, in an entry or its record."""


@dataclass(frozen=True)
class ListOptions:
    """List an archive: snapshot, size, grid, geometry, splits, the options of its ingests, and every sample."""

    url: tyro.conf.Positional[str]
    """Folder or URL of the archive."""
    snapshot: int | Literal["latest"] = "latest"
    """An earlier state of the archive, by its number."""
    json: bool = False
    """Print one JSON object instead, with everything that the archive states of each sample."""


def list_archive(arguments: list[str]) -> int:
    """What an archive has."""
    options = tyro.cli(ListOptions, prog="raylift archive ls", args=arguments)
    archive = Archive(options.url, options.snapshot)
    manifest, entries = archive.manifest, archive.entries()
    counts = Counter(entry.split for entry in entries)
    content: dict[str, Any] = {
        "url": archive.url,
        "contents": manifest.contents,
        "snapshot": manifest.snapshot,
        "samples": len(entries),
        "subjects": len({entry.subject for entry in entries}),
        "size_bytes": Folder(archive.url).size(),
        "splits": {split: counts[split] for split in SPLITS},
        "ingest_options": ingest_options(entries),
        "grid": to_plain(manifest.grid),
        "geometry": to_plain(manifest.geometry),
        "sha256": manifest.sha256(),
    }
    if options.json:
        content |= {"split_rule": to_plain(manifest.split_rule), "entries": [to_plain(entry) for entry in entries]}
        print(json.dumps(content, indent=1))
        return 0
    size_mib = content.pop("size_bytes") / 2**20
    for name, value in {**content, "size": f"{size_mib:.1f} MiB"}.items():
        print(f"{name:<8}  {_text(value)}")
    width = max(len(entry.id) for entry in entries)
    for entry in entries:
        size, spacing = (entry.record.get(name) for name in ("source_size", "source_spacing_mm"))
        scan = f"{'x'.join(map(str, size))} of {'x'.join(f'{mm:g}' for mm in spacing)} mm" if size and spacing else ""
        print("  ".join(filter(None, [f"{entry.id:<{width}}", f"{entry.split:<5}", entry.source, scan])))
    return 0


def ingest_options(entries: list[Entry]) -> dict[str, dict[str, int]]:
    """The number of samples by each option of their ingest."""
    counts: dict[str, Counter[str]] = {name: Counter() for name in INGEST_OPTIONS}
    for entry in entries:
        for name in INGEST_OPTIONS:
            value = getattr(entry, name, entry.record.get(name))
            if value is not None:
                counts[name][str(value)] += 1
    return {name: dict(sorted(count.items())) for name, count in counts.items() if count}


def _text(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{name} {_text(part)}" for name, part in value.items())
    if isinstance(value, list):
        return f"[{'; '.join(map(_text, value))}]"
    return str(value)


@dataclass(frozen=True)
class VerifyOptions:
    """Read an archive and compare everything with its SHA-256; the exit status is 1 if anything is damaged."""

    url: tyro.conf.Positional[str]
    """Folder or URL of the archive."""
    threads: int = 8
    """Samples that are read at the same time."""
    resume: Path | None = None
    """A file of the samples found sound, which is written; with the same file an interrupted verification continues."""


def verify_archive(arguments: list[str]) -> int:
    """Whether an archive is what was written."""
    options = tyro.cli(VerifyOptions, prog="raylift archive verify", args=arguments)
    try:
        archive = Archive(options.url)
    except (ArchiveNotFoundError, StoreError):
        raise
    except ArchiveError as error:
        print(f"damaged: {error}")
        return 1
    with progress_bar("verify") as bar:
        result = verify(
            archive,
            threads=options.threads,
            sound_samples=options.resume,
            progress=bar.update,
            report=lambda error: bar.print(f"damaged: {error}"),
        )
    if result.index_is_damaged:
        print(f"{archive.url}, snapshot {archive.manifest.snapshot}: restore its index, which lists the samples, first")
        return 1
    before = f", {result.verified_before} of them before" if result.verified_before else ""
    print(
        f"{archive.url}, snapshot {archive.manifest.snapshot}: {result.samples} samples verified{before}, "
        f"{result.damaged} damaged"
    )
    return 1 if result.damaged else 0


@dataclass(frozen=True)
class MergeOptions:
    """Add the samples of archives of one grid and geometry to another archive, each scan once.

    A new archive has the split rule of the first source.
    """

    urls: Annotated[tyro.conf.Positional[tuple[str, ...]], tyro.conf.arg(metavar="SOURCE [SOURCE ...] DESTINATION")]
    """Folders or URLs of archives; the last one is the destination."""
    samples_per_shard: int = 8
    """Samples in a shard; each full shard is published at once."""


def merge_archives(arguments: list[str]) -> int:
    """Samples of several archives to one."""
    options = tyro.cli(MergeOptions, prog="raylift archive merge", args=arguments)
    *sources, destination = options.urls
    if not sources:
        raise ConfigError("one archive: give one or more sources, and then the destination")
    with progress_bar("merge") as bar:
        merged = merge(
            sources,
            destination,
            samples_per_shard=options.samples_per_shard,
            progress=bar.update,
            report=lambda error: bar.print(f"damaged, left out: {error}"),
        )
    if merged.moved:
        print(
            f"warning: {merged.moved} samples are in another split than in their source, because the destination has "
            "another split rule: evaluate no model on them that was trained on the source"
        )
    for name, counts in ingest_options(Archive(destination).entries()).items():
        if len(counts) > 1:
            print(f"warning: the archive mixes values of {name}: {_text(counts)}")
    print(
        f"{absolute(destination)}: {merged.added} added, {merged.duplicates} of scans that it has already skipped, "
        f"{merged.damaged} damaged"
    )
    return 1 if merged.damaged else 0
