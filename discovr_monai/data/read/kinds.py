"""Which kind of file a name or its first bytes tell of, and what is said of one that fails."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from discovr_monai.base.types import CineError

VIDEO = {".avi", ".mp4", ".mov", ".mkv", ".m4v", ".webm", ".mpg", ".mpeg", ".wmv"}
NIFTI = (".nii", ".nii.gz")
ITK = {".mhd", ".mha", ".nrrd"}


def file_below(root: Path, name: str) -> Path:
    """A name's file below a folder.

    Raises:
        CineError: if a link leads outside.
    """
    path = root / name
    if not path.resolve().is_relative_to(root.resolve()):
        raise CineError(
            name, "it is a link that leads outside the folder", "Copy the file", "refused"
        )
    return path


def failure_of(error: Exception) -> tuple[str, str, str]:
    """(kind, problem, remedy) of a file, whatever reading it raised.

    A reader's own bug must not end a job of thousands: it sets one file aside.
    """
    if isinstance(error, CineError):
        return error.kind, error.problem, error.remedy
    if isinstance(error, MemoryError):
        return "unreadable", "it does not fit into memory", "Shorten or shrink it"
    kind = type(error).__name__
    return "unreadable", f"reading it failed ({kind})", "Report it, leave it out"


def known_name(name: str) -> bool:
    """Whether a file's name is one that a cine may have.

    DICOM files often have no suffix, or the last number of a UID in its place.

    >>> known_name("a/patient.avi"), known_name("IM0001"), known_name("notes.txt")
    (True, True, False)
    """
    suffix = Path(name).suffix.lower()
    suffixes = VIDEO | ITK | {".dcm", ".dicom", ".npy", ""}
    return suffix in suffixes or name.lower().endswith(NIFTI) or suffix[1:].isdigit()


def is_dicom(path: Path, head: bytes | None = None) -> bool:
    """Whether a file is DICOM by its first bytes or its suffix."""
    if head is None:
        with path.open("rb") as file:
            head = file.read(132)
    return head[128:132] == b"DICM" or path.suffix.lower() in (".dcm", ".dicom")


OURS = {"bad_files.csv", "datalist.json", "phantom.json"}  # never scanned as data


def walk(root: Path) -> Iterator[str]:
    """Files below root, links to folders not followed, hidden and our own files left out."""
    for folder, folders, names in os.walk(root):
        folders[:] = [f for f in folders if not f.startswith(".")]
        for name in names:
            raw = name.lower().endswith((".raw", ".zraw"))  # the pixels of an .mhd beside it
            if not name.startswith(".") and name not in OURS and not raw:
                yield str((Path(folder) / name).relative_to(root))
