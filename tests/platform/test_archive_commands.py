"""`raylift archive`: what it prints of an archive, and what it finds in a damaged one."""

import json
import shutil
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
from samples import GEOMETRY, GRID, entry, in_old_format, radiographs, same, sample, seed_of, with_views, write_archive

from raylift.datasets.archive import archive as module
from raylift.datasets.archive.archive import Archive
from raylift.datasets.archive.splits import SplitRule
from raylift.datasets.archive.store import Folder
from raylift.datasets.archive.writer import ArchiveWriter
from raylift.datasets.errors import StoreError
from raylift.datasets.serialization import to_plain
from raylift.platform import cli


@pytest.fixture
def url(tmp_path):
    url = str(tmp_path / "archive")
    with ArchiveWriter(url, GRID, GEOMETRY, split_rule=SplitRule((0.5, 0.25, 0.25)), samples_per_shard=3) as writer:
        for seed in range(9):
            choice = {"beyond_field_of_view": "mask" if seed < 2 else "keep", "table_removed": True}
            scan = {"source_size": [512, 512, 300 + seed], "source_spacing_mm": [0.7, 0.7, 1.25]}
            writer.add(replace(entry(seed), record={"seed": seed, **choice, **scan}), sample(seed))
    return url


def test_ls_prints_snapshot_size_splits_ingest_options_and_every_sample(url, capsys):
    assert cli.main(["archive", "ls", url]) == 0
    lines = capsys.readouterr().out.splitlines()
    archive = Archive(url)
    counts = Counter(entry.split for entry in archive.entries())
    bytes_there = sum(path.stat().st_size for path in Path(url).rglob("*") if path.is_file())
    words = {line.split()[0]: line.split(maxsplit=1)[1] for line in lines}
    assert words["snapshot"] == "3"
    assert words["samples"] == "9"
    assert words["size"] == f"{bytes_there / 2**20:.1f} MiB"
    assert words["splits"] == f"train {counts['train']}, val {counts['val']}, test {counts['test']}"
    assert words["sha256"] == archive.manifest.sha256()
    assert words["ingest_options"] == (
        "license CC0-1.0 9, label_method threshold 9, beyond_field_of_view keep 7, mask 2, table_removed True 9"
    )
    for stored in archive.entries():
        seed = stored.record["seed"]
        row = f"{stored.split} {seed}.nii.gz 512x512x{300 + seed} of 0.7x0.7x1.25 mm"
        assert words[stored.id].split() == row.split()


def test_ls_as_json_has_all_that_the_archive_states_also_of_an_earlier_snapshot(url, capsys):
    for snapshot, samples in (("latest", 9), ("2", 6)):
        assert cli.main(["archive", "ls", url, "--json", "--snapshot", snapshot]) == 0
        printed = json.loads(capsys.readouterr().out)
        archive = Archive(url, int(snapshot) if snapshot != "latest" else "latest")
        assert printed["entries"] == json.loads(json.dumps([to_plain(stored) for stored in archive.entries()]))
        assert len(printed["entries"]) == printed["samples"] == sum(printed["splits"].values()) == samples
        assert printed["sha256"] == archive.manifest.sha256()
        assert printed["split_rule"]["fractions"] == [0.5, 0.25, 0.25]


def test_verify_finds_a_sound_archive_sound_and_names_every_damaged_sample(url, capsys):
    assert cli.main(["archive", "verify", url]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == f"{url}, snapshot 3: 9 samples verified, 0 damaged"
    first, other = (Archive(url).manifest.entries[k] for k in (0, 4))
    folder, key = Folder(url), f"parts/{other.part}/labels/c/0/0/0/0"
    folder.remove(f"parts/{first.part}/volumes")
    damaged = bytearray(folder.read(key))
    damaged[len(damaged) // 2] ^= 1
    folder.write(key, bytes(damaged))
    assert cli.main(["archive", "verify", url, "--threads", "3"]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1] == f"{url}, snapshot 3: 9 samples verified, 4 damaged"
    named = [line.split(": ")[2] for line in lines if "damaged: " in line]
    assert named == [f"sample subject-{seed}" for seed in (0, 1, 2, 4)]
    assert all("restore the object, or" in line for line in lines if "damaged: " in line)


def test_verify_continues_an_interrupted_one_and_reads_damaged_samples_again(url, capsys, monkeypatch, tmp_path):
    read, whole = [], module.Archive.read_array

    def counted(self, entry, name):
        read.append((entry.id, name))
        return whole(self, entry, name)

    def interrupted(self, entry, name):
        if entry.record["seed"] == 5:
            raise StoreError(f"{self.url}: gone")
        return whole(self, entry, name)

    broken = Archive(url).manifest.entries[1]
    folder = Folder(url)
    shutil.copytree(f"{url}/parts/{broken.part}/labels", tmp_path / "labels")
    folder.remove(f"parts/{broken.part}/labels")
    arguments = ["archive", "verify", url, "--threads", "1", "--resume", str(tmp_path / "verified")]
    monkeypatch.setattr(module.Archive, "read_array", interrupted)
    assert cli.main(arguments) == 2
    lines = (tmp_path / "verified").read_text().splitlines()
    assert len(lines) == 2, "of samples 0 to 4 the first part's three are damaged"
    (tmp_path / "verified").write_text("\n".join([*lines[:1], lines[1][:9]]))  # the write of a line was interrupted
    monkeypatch.setattr(module.Archive, "read_array", counted)
    shutil.copytree(tmp_path / "labels", f"{url}/parts/{broken.part}/labels")
    capsys.readouterr()
    assert cli.main(arguments) == 0
    assert capsys.readouterr().out.splitlines()[-1].endswith("9 samples verified, 1 of them before, 0 damaged")
    assert sorted(set(read)) == sorted(
        (f"subject-{seed}", name) for seed in range(9) if seed != 3 for name in ("volumes", "radiographs", "labels")
    )
    read.clear()
    assert cli.main(arguments) == 0
    assert not read
    write_archive(url, [20])
    assert cli.main(arguments) == 0
    assert {name for name, _ in read} == {"subject-20"}


def test_the_samples_verified_in_one_archive_are_read_in_its_copy(url, capsys, tmp_path):
    shutil.copytree(url, tmp_path / "copy")
    for place, before in ((url, ""), (str(tmp_path / "copy"), ""), (url, ", 9 of them before")):
        assert cli.main(["archive", "verify", place, "--resume", str(tmp_path / "verified")]) == 0
        assert capsys.readouterr().out.splitlines()[-1].endswith(f": 9 samples verified{before}, 0 damaged")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--threads", "0"], "0 threads: give 1 or more"),
        (["--resume", "s3://bucket/x"], "is not a path of this machine"),
        (["--resume", "."], "is not a file of sound samples"),
    ],
)
def test_verify_refuses_what_it_cannot_use(url, options, message, capsys):
    assert cli.main(["archive", "verify", url, *options]) == 2
    assert message in capsys.readouterr().err


def archive_of(url, seeds, rule=None, subjects=(), **options):
    with ArchiveWriter(str(url), **{"grid": GRID, "geometry": GEOMETRY, "split_rule": rule, **options}) as writer:
        for seed, subject in zip(seeds, subjects or [""] * len(seeds), strict=True):
            made = sample(seed) if options.get("contents") != "radiographs" else radiographs(seed)
            writer.add(entry(seed, subject), made)
    return str(url)


def test_merge_adds_each_scan_once_and_counts_duplicates(tmp_path, capsys):
    one = archive_of(tmp_path / "one", range(4), SplitRule((0.5, 0.25, 0.25)), subjects=["a", "a", "b", "c"])
    two = archive_of(tmp_path / "two", range(3, 8), subjects=["c", "a", "d", "e", "f"])
    in_old_format(one)
    url = str(tmp_path / "all")
    assert cli.main(["archive", "merge", one, two, url, "--samples-per-shard", "3"]) == 0
    output = capsys.readouterr().out.splitlines()
    assert output[-1] == f"{url}: 8 added, 1 of scans that it has already skipped, 0 damaged"
    archive = Archive(url)
    assert [seed_of(stored) for stored in archive.manifest.entries] == list(range(8))
    assert [stored.id for stored in archive.manifest.entries] == ["a", "a-2", "b", "c", "a-3", "d", "e", "f"]
    rule = SplitRule((0.5, 0.25, 0.25))
    assert archive.manifest.split_rule == rule
    moved = 0
    for stored in archive.manifest.entries:
        assert same(archive.read(stored), sample(seed_of(stored)))
        assert stored.split == rule.split(stored.subject)
        moved += seed_of(stored) >= 4 and stored.split != SplitRule().split(stored.subject)
    assert moved > 0
    assert f"warning: {moved} samples are in another split than in their source" in output[-2]
    assert cli.main(["archive", "merge", two, one, url]) == 0
    assert (
        capsys.readouterr().out.splitlines()[-1] == f"{url}: 0 added, 9 of scans that it has already skipped, 0 damaged"
    )
    assert Archive(url).manifest.snapshot == archive.manifest.snapshot


def test_merge_of_radiographs_without_ct(tmp_path):
    one, two = (archive_of(tmp_path / str(k), [2 * k, 2 * k + 1], contents="radiographs") for k in range(2))
    assert cli.main(["archive", "merge", one, two, str(tmp_path / "all")]) == 0
    archive = Archive(str(tmp_path / "all"))
    for seed, stored in enumerate(archive.manifest.entries):
        assert (archive.read_array(stored, "radiographs") == radiographs(seed).radiographs).all()


def test_a_merge_leaves_damaged_samples_out_and_adds_them_once_they_are_restored(tmp_path, capsys):
    one = archive_of(tmp_path / "one", range(6), samples_per_shard=2)
    url, folder = str(tmp_path / "all"), Folder(one)
    key = f"parts/{Archive(one).manifest.entries[3].part}/volumes/c/0/0/0/0"
    whole = folder.read(key)
    folder.remove(key)
    assert cli.main(["archive", "merge", one, url, "--samples-per-shard", "2"]) == 1
    output = capsys.readouterr().out
    assert output.count("damaged, left out: sample subject-") == 2
    assert output.splitlines()[-1] == f"{url}: 4 added, 0 of scans that it has already skipped, 2 damaged"
    assert [seed_of(stored) for stored in Archive(url).entries()] == [0, 1, 4, 5]
    folder.write(key, whole)
    assert cli.main(["archive", "merge", one, url]) == 0
    last = f"{url}: 2 added, 4 of scans that it has already skipped, 0 damaged"
    assert capsys.readouterr().out.splitlines()[-1] == last
    assert sorted(seed_of(stored) for stored in Archive(url).entries()) == list(range(6))


def test_a_merge_counts_duplicates_and_earlier_samples_that_are_in_another_split(tmp_path, capsys):
    train = archive_of(tmp_path / "train", range(4), SplitRule((1.0, 0.0, 0.0)))
    test = archive_of(tmp_path / "test", range(6), SplitRule((0.0, 0.0, 1.0)))
    for _ in range(2):
        assert cli.main(["archive", "merge", train, test, str(tmp_path / "all")]) == 0
        assert "warning: 6 samples are in another split than in their source" in capsys.readouterr().out


def test_a_merge_of_other_options_prints_them(tmp_path, capsys):
    for name, seed, beyond in (("one", 0, "keep"), ("two", 1, "mask")):
        with ArchiveWriter(str(tmp_path / name), GRID, GEOMETRY) as writer:
            made = entry(seed)
            writer.add(replace(made, record={**made.record, "beyond_field_of_view": beyond}), sample(seed))
    assert cli.main(["archive", "merge", *(str(tmp_path / name) for name in ("one", "two", "all"))]) == 0
    line = "warning: the archive mixes values of beyond_field_of_view: keep 1, mask 1"
    assert line in capsys.readouterr().out.splitlines()


def test_verify_names_a_damaged_manifest(url, capsys):
    [*_, newest] = sorted(Path(url, "manifests").glob("*.json"))
    newest.write_bytes(newest.read_bytes()[:-40])
    assert cli.main(["archive", "verify", url]) == 1
    assert f"damaged: {newest}" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"grid": replace(GRID, spacing_mm=19.0)}, "has grid Grid"),
        ({"geometry": with_views(GEOMETRY, *GEOMETRY.views[:1])}, "has geometry Geometry"),
        ({"contents": "radiographs"}, "has contents radiographs"),
    ],
)
def test_merge_refuses_archives_that_differ(tmp_path, capsys, options, message):
    one = archive_of(tmp_path / "one", [0])
    url = tmp_path / "two"
    with ArchiveWriter(str(url), **{"grid": GRID, "geometry": GEOMETRY, **options}) as writer:
        writer.add(entry(1), radiographs(1) if "contents" in options else sample(1))
    assert cli.main(["archive", "merge", one, str(url), str(tmp_path / "all")]) == 2
    error = capsys.readouterr().err
    assert f"{url} {message}" in error
    assert f"{one} has " in error
    assert not (tmp_path / "all").exists()
    assert cli.main(["archive", "merge", one, str(url)]) == 2
    assert f"{url} holds" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("names", "message"), [(["one"], "give one or more sources"), (["one", "two", "one"], "is a source and the dest")]
)
def test_merge_refuses_too_few_archives_and_a_destination_that_is_a_source(tmp_path, capsys, names, message):
    for name in {*names}:
        archive_of(tmp_path / name, [len(name)])
    assert cli.main(["archive", "merge", *(str(tmp_path / name) for name in names)]) == 2
    assert message in capsys.readouterr().err
