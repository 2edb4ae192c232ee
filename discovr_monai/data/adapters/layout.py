"""What adapters share: finding folders, normal names, labels by a threshold."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from discovr_monai.base.types import CineError

SPLITS = {
    **dict.fromkeys(("train", "training"), "training"),
    **dict.fromkeys(("val", "valid", "validation", "dev"), "validation"),
    **dict.fromkeys(("test", "testing"), "test"),
}
GET_IT = "Copy the data set again, or leave it out"


def split_name(text: str) -> str | None:
    """ "TRAIN", "Val", "testing" ... as our sections; None for what is none."""
    return SPLITS.get(text.strip().lower())


def below(value: float | None, threshold: float) -> int | None:
    """1, abnormal, below the threshold; None without a value."""
    return None if value is None else int(value < threshold)


def percent(value: float | None) -> float | None:
    """A fraction of 0 to 100; None for what cannot be one."""
    return value if value is not None and 0 <= value <= 100 else None


def find_folder(root: Path, marker: str, title: str) -> Path:
    """The folder that holds ``marker``: the root, or at most three levels below it.

    Raises:
        FileNotFoundError: if none does.
    """
    for pattern in ("", "*/", "*/*/", "*/*/*/"):
        places = sorted(root.glob(pattern + marker))
        if places:
            return places[0].parent
    raise FileNotFoundError(
        f"{root.name!r} does not look like {title}: there is no {marker} in it. Give the folder "
        "that the data set unpacks to"
    )


def files_by_stem(folder: Path, suffixes: Sequence[str]) -> dict[str, Path]:
    """Files below a folder by their name without suffix, in lower case."""
    files: dict[str, Path] = {}
    for path in sorted(folder.rglob("*")):
        for suffix in suffixes:
            if path.name.lower().endswith(suffix) and not path.name.startswith("."):
                files.setdefault(path.name[: -len(suffix)].lower(), path)
    return files


def missing(name: str, what: str = "it is listed, but the file is not there") -> CineError:
    """The error for a listed file that does not exist."""
    return CineError(name, what, GET_IT, "missing")


def relative(path: Path, root: Path) -> str:
    """Path below the root, with forward slashes."""
    return path.relative_to(root).as_posix()


def read_cfg(path: Path) -> Iterator[tuple[str, str]]:
    """ "Key: value" lines; the keys in lower case."""
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        key, colon, value = line.partition(":")
        if colon and key.strip():
            yield key.strip().lower(), value.strip()
