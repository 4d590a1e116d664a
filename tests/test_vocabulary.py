"""The project uses the vocabulary of its field: no synonyms of established terms, no personification of code."""

import re
import subprocess
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[1]
FOLDERS = [
    "CHANGELOG.md",
    "CONTRIBUTING.md",
    "README.md",
    "SECURITY.md",
    "benchmarks",
    "datasets",
    "docs",
    "models",
    "platform",
    "raylift",
    "serve",
    "tests",
    "tune_spaces",
    ":!tests/test_vocabulary.py",
]
"""Git paths where the vocabulary holds."""
WORDS = {
    r"\btold\b|\btells?\b|\btelling\b": "predict, prediction",
    r"\bknows?\b|\bknew\b|\bknowing\b": "say what a function or network has or depends on",
    r"\b(?:asks?|asked|asking)\b": "query, need, require",
    r"\bteach(?:es)?\b|\btaught\b": "loss, objective, supervise",
    r"\bthinks?\b": "mlp",
    r"\b(?:judge[sd]?|judging)\b": "score",
    r"\bhung\b|\bhangs?\b": "oriented",
    r"\bdraws?\b|\bdrawn\b|\bdrawing\b|\bdrew\b": "sample",
    r"\bone_step\b|\bone-step\b": "predict_x0",
    r"\bstraight path\b|\bstraight line\b": "shortcut; linear",
    r"\btruths?\b": "ground truth",
    r"\bmoving average\b": "exponential moving average",
    r"\b(?:optimiser|normalis|centre|neighbour|colour)\w*": "American spelling",
    r"\b(voxels|pixels) a side\b": "voxels per side",
    r"\bstandardi[sz]\w*": "normalize (to [0, 1]; a standardized image has mean 0 and variance 1)",
    r"\bgrow(?:n|ing)\b": "upsample",
    r"\b(?:nobody|somebody|whoever|a stranger)\b": "the user, the reader",
    r"\btwins?\b": "a branch for each view",
    r"(?<!growth )\brate\b(?=[:=])": "lr",
    r"\bsees\b|\bseen by\b|\blook(?:s|ed|ing)? at\b": "input, field of view",
    r"\bwants\b|\bbelieves?\b|\bguess(?:es|ed)?\b": "need, estimate, prediction",
    r"\banswer(?:s|ed|ing)?\b": "output, response",
    r"\bsuits? (?:it|them|each)\b|\bfor good\b|\bsliver\b|\bshadows\b": "best fit, permanently, fraction, projection",
    r"\b(?:dies|lives in|pays for)\b": "end, be in, cost",
    r"\bretone\b|\bdevelop(?:ed|s)\b|\bdevelopments\b": "acquisition, processing",
    r"\bbegan as\b|\bfresh weights\b|\btipped\b": "based on, initial weights, tilted",
    r"\bsays?\b|\bheld by\b": "state, contain",
    r"\bgo(?:es)? on (?:with|from)\b": "resume",
    r"\bx-rays alone\b|\blearns? from (?:radiographs|volumes)\b": "unpaired, supervised by",
    r"\bcuts the body\b|\blungs are cut\b": "truncate (field-of-view truncation)",
    r"\bfeedback\b|\bcarried\b": "view decoders, outputs",
    r"\bbeside\b": "next to, with, compared with",
    r"\bpatient frame\b|\bsource[- ]axis\b": "patient coordinates, source to isocenter",
    r"\bCTs\b": "CT scans",
    r"\bpictures?\b|\b(?:min|max) places\b": "image, figure; slot",
    r"\bconsistency fit\b(?<!data-consistency fit)|[+] data consistency": "data-consistency fit",
    r"\bacquired radiographs?\b|\b(?:five|one) decibels?\b|\bone an? \w+[.,;:]": "real radiographs; dB; one per",
    r"\bplayers?\b|\btake turns\b": "network, loss module, training step",
    r"^\s*\"\"\"Of ": "name the quantity: channels, weight, decay of",
}
ALLOWED = [
    r"ground[_ -]truths?",
    r"exponential moving average",
    r"\bbeside[_ ](?:spine|heart)\b",
    r"ImageDraw\.Draw|\bdraw\.text|\bdraw, font|docs/figures.py` draws|Draw the figures of the documentation",
    r"\bdraw\(st\.|\bdata\.draw\(|\bdraw: st\.DrawFn",
]
"""Terms that contain such a word."""


def tracked() -> list[Path]:
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard", *FOLDERS],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        check=True,
    ).stdout.split()
    return [REPOSITORY / name for name in listed if name.endswith((".py", ".md", ".yaml", ".ts", ".html"))]


@pytest.mark.parametrize(("word", "term"), WORDS.items(), ids=WORDS.values())
def test_established_terms_have_no_synonyms(word, term):
    pattern, allowed = re.compile(word, re.IGNORECASE), re.compile("|".join(ALLOWED), re.IGNORECASE)
    paths = tracked()
    assert len(paths) > 10
    found = []
    for path in paths:
        # Identifiers count as the words that they are made of.
        for number, line in enumerate(allowed.sub("", path.read_text()).splitlines(), start=1):
            if pattern.search(line.replace("_", " ") if "one_step" not in word else line):
                found.append(f"{path.relative_to(REPOSITORY)}:{number}: {line.strip()}")
    assert not found, f"use {term}:\n" + "\n".join(found)
