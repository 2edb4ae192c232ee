"""What may be called how: ids, tags and file names of a request, none of which is a path."""

from __future__ import annotations

import re

ID = re.compile(r"[A-Za-z0-9](?:[A-Za-z0-9_-]|\.(?!\.)){0,63}")
TAG = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,31}")
FILE = re.compile(r"[^/\\\0]{0,200}\.nii(\.gz)?", re.IGNORECASE)


def check_id(value: str) -> str:
    """An id of an image.

    Raises:
        ValueError: for what is none.
    """
    if not ID.fullmatch(value) or value.lower().endswith((".nii", ".gz")):
        raise ValueError(
            f"{value[:80]!r} is no id: use up to 64 letters, digits, points, - and _, no suffix"
        )
    return value


def check_tag(value: str) -> str:
    """A tag of a label.

    Raises:
        ValueError: for what is none.
    """
    if not TAG.fullmatch(value):
        raise ValueError(f"{value[:80]!r} is no tag: use up to 32 letters, digits, - and _")
    return value


def check_file(value: str) -> str:
    """The name of a file that was sent, of whose path (clients send it) only the suffix is used.

    Raises:
        ValueError: for another.
    """
    name = re.split(r"[/\\]", value)[-1]
    if not FILE.fullmatch(name):
        raise ValueError(f"{name[-80:]!r} cannot be taken: send .nii.gz or .nii")
    return name
