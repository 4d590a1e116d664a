"""CSV files in UTF-8, with or without the byte-order mark that spreadsheets write."""

from __future__ import annotations

import csv
from collections.abc import Iterable, Sequence
from pathlib import Path

from raylift.datasets.errors import ConfigError


def read_rows(path: Path) -> tuple[list[str], list[dict[str, str]]]:
    """Column names, and rows as dictionaries; missing values are empty strings.

    Raises:
        ConfigError: not a CSV in UTF-8.
    """
    try:
        # Spreadsheets put a byte-order mark before the first column's name.
        with path.open(newline="", encoding="utf-8-sig") as file:
            rows = csv.DictReader(file, restval="")
            return list(rows.fieldnames or ()), [
                {name: (value or "").strip() for name, value in row.items() if name is not None} for row in rows
            ]
    except (UnicodeDecodeError, csv.Error) as error:
        raise ConfigError(f"{path}: not a CSV in UTF-8: {error}") from error


def write_rows(path: Path, columns: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    """Write a CSV in UTF-8 with a row of column names.

    Raises:
        ConfigError: the file cannot be written.
    """
    try:
        with path.open("w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            writer.writerow(columns)
            writer.writerows(rows)
    except OSError as error:
        raise ConfigError(f"{path}: cannot be written: {error.strerror}") from error
