"""docs/systems.md against the code: its tests exist, its names are settings, its counts and results are those."""

import re
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import get_args, get_type_hints

import pytest
import torch
import yaml

from raylift.datasets.geometry import Grid, chest
from raylift.datasets.serialization import to_plain
from raylift.models.composition import Composition
from raylift.models.zoo import SYSTEMS, parameters
from raylift.platform import cli
from raylift.platform.commands.about import COLUMNS, markdown, row
from raylift.platform.config import flatten, override
from raylift.platform.presets import PRESETS
from raylift.platform.training.memory import GIB, estimate

REPOSITORY = Path(__file__).resolve().parents[1]
PAGE = (REPOSITORY / "docs/systems.md").read_text(encoding="utf-8")
SECTIONS = {part.splitlines()[0]: part for part in re.split(r"^##+ ", PAGE, flags=re.MULTILINE)[1:]}


def test_every_test_and_every_file_that_the_documents_name_is_there():
    sources = "\n".join(path.read_text(encoding="utf-8") for path in (REPOSITORY / "tests").rglob("test_*.py"))
    tests = set(re.findall(r"^ *def (test_\w+)", sources, re.MULTILINE))
    named = []
    for page in (*(REPOSITORY / "docs").rglob("*.md"), *REPOSITORY.glob("*.md")):
        spans = re.findall(r"`([^`\n]+)`", page.read_text(encoding="utf-8"))
        named += (named_here := [span for span in spans if re.fullmatch(r"test_\w+", span)])
        assert not set(named_here) - tests, page.name
        paths = [span for span in spans if re.fullmatch(r"(datasets|models|platform|serve|tests|\w+s)/[\w./]*", span)]
        # What the guides' own commands make.
        paths = [path for path in paths if not path.startswith(("runs/", "models/first", "models/chest"))]
        assert not [path for path in paths if "/" in path[:-1] and not (REPOSITORY / path).exists()], page.name
    assert len(named) > 8


def test_the_table_of_parts_has_every_name_and_no_other():
    rows = re.findall(r"^\| [^|]+ \| ([^|]*`system\.[^|]+) \| ([^|]+) \|$", SECTIONS["The parts"], re.MULTILINE)
    keys = []
    for cell, names in rows:
        for key, group in zip(re.findall(r"`system\.([\w.]+)`", cell), names.split(";"), strict=False):
            owner: type = Composition
            *parts, leaf = key.split(".")
            for part in parts:
                owner = get_type_hints(owner)[part]
            assert set(re.findall(r"`([^`]+)`", group)) == set(get_args(get_type_hints(owner)[leaf])), key
            keys.append(key)
    parts = ("encoder", "lifting", "fusion", "decoder", "discriminator")
    assert set(keys) == {*(f"{part}.kind" for part in parts), "lifting.along", "decoder.head"}


def test_the_table_of_systems_is_that_of_the_command():
    table = PAGE.split("<!-- systems: raylift systems --markdown -->\n")[1].split("<!-- end -->")[0]
    head, rule, *rows = table.strip().splitlines()
    assert (head, rule) == tuple(markdown(COLUMNS, []).splitlines())
    named = [re.findall(r"\| ([^|]+) \|", line)[0] for line in rows]
    by_title = {entry.title: name for name, entry in SYSTEMS.items()}
    assert rows == markdown(COLUMNS, [row(by_title[title]) for title in named]).splitlines()[2:]
    assert len(rows) >= 16


def test_every_setting_that_the_page_names_takes_the_value_it_gives():
    presets = list(PRESETS.values())
    spans = [span for span in re.findall(r"`([^`\n]+)`", PAGE) if not span.endswith("*")]
    found = [pair for span in spans for pair in re.findall(r"(system(?:\.[a-z][\w-]*)+)(?: ([^\s-]\S*))?", span)]
    assert len(found) > 20
    for flag, value in found:
        name = flag.replace("-", "_")
        having = [run for run in presets if any(f"{key}.".startswith(f"{name}.") for key in flatten(to_plain(run)))]
        assert having, f"{flag} is a setting of no preset"
        if value:
            assert flatten(to_plain(override(having[0], {name: yaml.safe_load(value)})))[name] == yaml.safe_load(value)


def test_the_crossing_on_the_page_is_a_run(capsys):
    (command,) = re.findall(r"`raylift (train x2ct-gan-slim [^`]+)`", PAGE)
    assert cli.main([*command.split(), "--dry-run"]) == 0
    reported = capsys.readouterr().out
    assert {"kind: duo", "kind: alignment", "kind: coordinate"} <= {line.strip() for line in reported.splitlines()}


@cache
def counts(name: str) -> set[int]:
    """Parameters of every network of a system as published, at 128 and, where it has one, with a single view."""
    entry = SYSTEMS[name]
    systems = [entry.full]
    if entry.views == "1 or 2":
        systems.append(replace(systems[0], views=systems[0].views[:1]))
    found = set()
    with torch.device("meta"):
        for grid in (Grid(size) for size in {entry.training.size, 128}):
            for system in systems:
                networks = system.objective(grid, chest(grid)).networks().values()
                found |= {parameters(network) for network in networks}
    return found


COUNTED = {heading: re.findall(r"\d{1,3}(?:,\d{3}){2,}", text) for heading, text in SECTIONS.items()}


@pytest.mark.parametrize("heading", [heading for heading, found in COUNTED.items() if found])
def test_every_count_of_parameters_is_that_of_its_section_s_system(heading):
    titles = {title.casefold() for title in heading.split(", ")}
    names = [name for name, entry in SYSTEMS.items() if entry.title.casefold() in titles]
    assert names
    for count in COUNTED[heading]:
        assert int(count.replace(",", "")) in set().union(*map(counts, names)), f"{heading}: {count}"


def test_every_cnn_and_gan_states_its_count():
    (part,) = re.findall(r"^## CNNs and GANs\n(.*?)^## ", PAGE, re.MULTILINE | re.DOTALL)
    headings = re.findall(r"^### (.*)$", part, re.MULTILINE)
    assert len(headings) >= 7
    for heading in headings:
        assert COUNTED[heading], heading


def gib(name: str, **changes: str) -> int:
    run = PRESETS[name]
    system = replace(run.system, checkpointing=changes.get("checkpointing", run.system.checkpointing))
    engine = replace(run.engine, precision=changes.get("precision", run.engine.precision))
    return round(estimate(replace(run, system=system, engine=engine)).total / GIB)


def test_the_memory_on_the_page_is_the_estimate():
    plain, recomputed, halved = (
        gib("duolift-gan", checkpointing=checkpointing, precision=precision)
        for checkpointing, precision in (("none", "fp32"), ("all", "fp32"), ("all", "bf16"))
    )
    reported = (
        f"falls from {plain} to {recomputed} GiB, and to {halved} in bf16; X-Recon's 224^3 takes {gib('x-recon')} GiB"
    )
    assert reported in PAGE


def test_the_slim_diffusion_presets_take_the_fewest_steps_that_lose_next_to_nothing():
    for name in ("diffux2ct", "latent-diffusion"):
        (path,) = (REPOSITORY / "benchmarks/results").glob(f"*-sampling_steps-{name}-slim.md")
        (fewest,) = re.findall(r"^Fewest steps .*: (\d+)\.$", path.read_text(encoding="utf-8"), re.MULTILINE)
        assert PRESETS[f"{name}-slim"].system.sampling.steps == int(fewest)


def test_the_refiner_takes_the_fewest_steps_that_lose_next_to_nothing():
    (path,) = (REPOSITORY / "benchmarks/results").glob("*-refiner.md")
    rows = re.findall(r"^\| (\d+) steps \| 1 \| ([\d.]+)", path.read_text(encoding="utf-8"), re.MULTILINE)
    reached = {int(steps): float(psnr) for steps, psnr in rows}
    assert len(reached) == 4
    fewest = min(steps for steps, psnr in reached.items() if max(reached.values()) - psnr < 0.1)
    assert SYSTEMS["refiner"].full.sampling.steps == PRESETS["refiner-slim"].system.sampling.steps == fewest


def test_every_slim_system_went_through_every_command():
    (path,) = (REPOSITORY / "benchmarks/results").glob("*-commands.md")
    rows = {
        cells[0]: cells[2:]
        for line in path.read_text().splitlines()
        if len(cells := line.strip("| ").split(" | ")) == 8
    }
    assert set(rows) - {"preset", "---"} <= {name for name in PRESETS if name.endswith("-slim")}
    assert len(rows) > 10
    assert all(cell.isdecimal() for name, cells in rows.items() if name.endswith("-slim") for cell in cells)


def numbers(text: str) -> list[str]:
    """Numbers with decimals, of a text without its links."""
    return re.findall(r"[-+]?\d+\.\d+", re.sub(r"\]\([^)]*\)", "]", text))


@pytest.mark.parametrize(
    ("result", "begins", "ends"),
    [
        ("refiner", "On 12 held-out phantoms", "### Sampling"),
        ("sampling_steps-diffux2ct-tiny", "A slim DiffuX2CT trained", "### Exponential moving average"),
        ("training_step", "the published X2CT-GAN at 128^3 goes", "By the estimate"),
        ("slim_training_step", "## Time of a training step of the slim presets", "no end"),
    ],
)
def test_every_figure_of_a_benchmark_stands_in_its_result(result, begins, ends):
    (path,) = (REPOSITORY / "benchmarks/results").glob(f"*-{result}.md")
    measured = numbers(path.read_text(encoding="utf-8"))
    passage = PAGE.split(begins)[1].split(ends)[0]
    assert numbers(passage)
    for number in numbers(passage):
        places = len(number.split(".")[1])
        rounded = {f"{float(one):.{places}f}" for one in measured}
        assert number.lstrip("+") in rounded, f"{number} stands in no row of {path.name}"
