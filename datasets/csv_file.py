"""CSV files that people write: UTF-8, with or without the byte-order mark of a spreadsheet."""

from __future__ import annotations

import csv
from pathlib import Path

from raylift.datasets.errors import ConfigError


def read_rows(path: Path) -> tuple[list[str], list[dict[str, str]]]:
    """The columns, and the rows by column; what a short row lacks is empty.

    Raises:
        ConfigError: no CSV in UTF-8.
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
