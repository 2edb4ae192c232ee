"""CSV tables as data sets ship them, and as we write them."""

from __future__ import annotations

import csv
import gzip
import io
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from discovr_monai.base.files import save_atomic

csv.field_size_limit(1 << 20)


def read_table(
    path: Path, required: Sequence[str] = (), *, delimiter: str = ","
) -> Iterator[dict[str, str]]:
    """Rows of a CSV (or .csv.gz) as dicts of stripped text.

    UTF-8 with or without a byte order mark, else Latin-1; header names are stripped; empty lines
    are skipped; short rows are filled with "".

    Raises:
        ValueError: naming the columns that are missing, or where it is not a table.
        FileNotFoundError: if it is not there.
    """
    try:
        raw = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    except FileNotFoundError:
        raise FileNotFoundError(f"{path.name} is not there. Check the data set's folder") from None
    except (OSError, EOFError) as error:
        raise ValueError(f"{path.name} cannot be read ({type(error).__name__})") from error
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError:
        text = raw.removeprefix(b"\xef\xbb\xbf").decode("latin-1")
    try:
        rows = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter)
        header = [name.strip() for name in next(rows, [])]
        missing = [name for name in required if name not in header]
        if missing:
            raise ValueError(
                f"{path.name} lacks the column{'s' * (len(missing) > 1)} {', '.join(missing)}; it "
                f"has {', '.join(header[:12]) or 'none'}"
            )
        for row in rows:
            if any(cell.strip() for cell in row):
                cells = [cell.strip() for cell in row] + [""] * (len(header) - len(row))
                yield dict(zip(header, cells, strict=False))
    except csv.Error as error:
        raise ValueError(f"{path.name} is not a table ({error})") from error


def number(cell: str | None) -> float | None:
    """A cell as a finite number, or None for what is none; a comma may be the decimal point.

    >>> number(" 55,3 "), number("No Systolic"), number("nan"), number(None)
    (55.3, None, None, None)
    """
    try:
        value = float((cell or "").replace(",", "."))
    except ValueError:
        return None
    return value if value == value and abs(value) != float("inf") else None


def shown(name: str) -> str:
    """A file name that any terminal or UTF-8 file can show: other bytes are escaped."""
    return name.encode("utf-8", "backslashreplace").decode()


def safe_cell(value: Any) -> Any:
    """A cell that no spreadsheet runs as a formula.

    >>> safe_cell("=1+1"), safe_cell("A4C"), safe_cell(-3)
    ("'=1+1", 'A4C', -3)
    """
    if not isinstance(value, str):
        return value
    value = shown(value)
    return f"'{value}" if value[:1] in ("=", "+", "-", "@", "\t", "\r") else value


def write_table(
    path: Path,
    header: Sequence[str],
    rows: Iterable[Sequence[Any]],
    *,
    mode: int | None = None,
) -> None:
    """Writes a CSV whole or not at all; cells are safe for spreadsheets.

    Args:
        path, mode: see :func:`discovr_monai.base.files.save_atomic`.
        header: names of the columns.
        rows: a cell for each; may be a generator.
    """

    def write(temporary: Path) -> None:
        with temporary.open("w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            writer.writerow(header)
            writer.writerows([safe_cell(cell) for cell in row] for row in rows)

    save_atomic(write, path, mode=mode)
