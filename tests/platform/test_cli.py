"""The command line: fast help, and errors as one line with exit status 2."""

import os
import subprocess
import sys
import time

import pytest

from raylift.models.zoo import SYSTEMS
from raylift.platform import cli
from raylift.platform.model_store import MODELS, package_folder, sha256_of

COMMANDS = list(cli.COMMANDS)


def raylift(*arguments):
    return subprocess.run([sys.executable, "-m", "raylift", *arguments], capture_output=True, text=True, timeout=120)


def test_help_lists_every_command_and_does_not_import_torch():
    started = time.monotonic()
    result = raylift("--help")
    assert time.monotonic() - started < 2
    assert result.returncode == 0
    assert all(f"\n  {command} " in result.stdout for command in COMMANDS)


def test_help_of_a_group_of_commands_lists_them_and_no_other(capsys):
    assert cli.main(["archive", "--help"]) == 0
    listed = [line.split("  ")[1] for line in capsys.readouterr().out.splitlines() if line.startswith("  ")]
    assert listed == ["archive ls", "archive verify", "archive merge"]


@pytest.mark.parametrize("arguments", [("systems",), ("score", "--help")])
def test_a_reader_of_the_output_that_ends_first_causes_no_traceback(arguments):
    read, write = os.pipe()
    os.close(read)
    result = subprocess.run(
        [sys.executable, "-m", "raylift", *arguments], stdout=write, stderr=subprocess.PIPE, text=True, timeout=120
    )
    os.close(write)
    assert (result.returncode, result.stderr) == (1, "")


def test_without_a_standard_output_a_command_ends_without_a_traceback():
    command = f"{sys.executable} -m raylift --version >&-"
    result = subprocess.run(command, shell=True, stderr=subprocess.PIPE, text=True, timeout=120)
    assert (result.returncode, result.stderr) == (0, "")


@pytest.mark.parametrize("command", [command for command in COMMANDS if command not in ("train", "tune")])
def test_every_command_has_help_with_its_defaults(command, capsys):
    with pytest.raises(SystemExit) as exit_status:
        cli.main([*command.split(), "--help"])
    assert exit_status.value.code == 0
    output = capsys.readouterr().out
    assert f"raylift {command}" in output
    if command not in ("models", "systems", "doctor", "export", "import-x2ct"):
        assert "(default: " in output
        assert "(required)" in output or command in ("serve", "runs", "ptx", "archive merge")


def test_the_help_of_a_preset_shows_every_setting_with_its_default_and_unit(capsys):
    with pytest.raises(SystemExit):
        cli.main(["train", "x2ct-gan-slim", "--help"])
    output = capsys.readouterr().out
    for flag in ("--data.archive", "--data.window.low-hu", "--engine.zero-stage", "--data.cache-gib", "--train.steps"):
        assert flag in output
    assert "(default: 300)" in output


def test_train_without_a_preset_lists_them(capsys):
    assert cli.main(["train"]) == 2
    assert "x2ct-gan-slim" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "output"),
    [
        (["nonsense"], "unknown command 'nonsense'"),
        (["archive"], "unknown command 'archive': use one of archive ls, archive verify"),
        (["archive", "list", "a"], "unknown command 'archive list': use one of archive ls, archive verify"),
        (["train", "x2ct-gna"], "unknown preset 'x2ct-gna'"),
        (["train", "x2ct-gan-tiny", "--data.archive", "no/such/place"], "holds no raylift archive"),
        (["train", "--resume", "no/such/run"], "is not a run"),
        (["train", "x2ct-gan-tiny", "--until", "1000000"], "--until 1000000 is above train.steps"),
        (["tune", "no_space"], "no search space 'no_space'"),
        (["evaluate", "no/model", "--archive", "no/archive"], "is not a model"),
        (
            ["evaluate", "models:chest-65", "--archive", "no/archive"],
            "unknown model 'models:chest-65': use models:chest-64",
        ),
        (["evaluate", "models:chest-64", "--archive", "s3:/bucket/a"], "write s3://bucket/a"),
        (["evaluate", "a", "--archive", "b", "--output", "s3://bucket/a"], "is not a path of this machine"),
        (["export", "models:chest-64", "s3://bucket/a"], "is not a path of this machine"),
        (["train", "x2ct-gan-tiny", "--from", "models:x"], "unknown model 'models:x'"),
        (["train", "x2ct-gan-tiny", "--output", "gs:runs"], "write gs://runs or ./gs:runs"),
        (["ingest", "no/such/file", "--archive", "s3://key:secret@bucket/a"], "set them in the environment"),
    ],
)
def test_an_error_is_one_line_on_stderr_and_status_2(arguments, output, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert cli.main(arguments) == 2
    err = capsys.readouterr().err.strip()
    assert output in err
    assert "Traceback" not in err
    assert "secret" not in err


def test_a_dry_run_prints_the_whole_configuration_and_memory_and_starts_nothing(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert cli.main(["train", "x2ct-gan", "--dry-run", "--train.batch-size", "2"]) == 0
    output = capsys.readouterr().out
    assert "batch_size: 2" in output
    assert "generator: 61,740,467 parameters" in output
    assert "total per worker:" in output
    assert not list(tmp_path.iterdir())


def test_the_output_of_a_dry_run_is_a_configuration(capsys, tmp_path):
    cli.main(["train", "x2ct-gan-tiny", "--dry-run", "--system.fusion.kind", "sum"])
    first = capsys.readouterr().out
    path = tmp_path / "mine.yaml"
    path.write_text(first)
    cli.main(["train", str(path), "--dry-run"])
    assert capsys.readouterr().out == first


def test_systems_shows_every_system_of_the_literature(capsys):
    assert cli.main(["systems"]) == 0
    output = capsys.readouterr().out
    assert "61,740,467" in output
    # A narrow screen breaks cells, but never a word.
    words = set(output.replace("│", " ").split())
    for name, published in SYSTEMS.items():
        assert set(published.title.split()) <= words
        assert name in words
        assert set(published.paper.split()) <= words


def test_models_lists_name_views_grid_size_license_figures_and_place(capsys):
    assert cli.main(["models"]) == 0
    output = capsys.readouterr().out
    for name, entry in MODELS.items():
        assert f"models:{name}\n" in output
        assert entry.license in output
        assert sha256_of(f"models:{name}")[:12] in output
    for text in ("frontal, lateral", "64^3 voxels of 5 mm", "MiB", "phantom_psnr_db", str(package_folder("chest-64"))):
        assert text in output


def test_doctor_finds_what_is_installed(capsys):
    assert cli.main(["doctor"]) == 0
    output = capsys.readouterr().out
    assert "ok   torch" in output
    assert "FAIL" not in output


def test_doctor_names_a_store_that_does_not_respond(capsys, monkeypatch):
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", "http://127.0.0.1:9")
    assert cli.main(["doctor"]) == 1
    output = capsys.readouterr().out
    assert "http://127.0.0.1:9 does not respond" in output
    assert "-> start it or correct the variable" in output


def test_the_same_phantom_command_adds_nothing_the_second_time(capsys, tmp_path):
    arguments = ["phantom", "--archive", str(tmp_path / "a"), "--count", "4", "--size", "32", "--spacing-mm", "10"]
    assert cli.main(arguments) == 0
    assert "4 added" in capsys.readouterr().out
    assert cli.main(arguments) == 0
    assert "0 added, 4 already present" in capsys.readouterr().out
