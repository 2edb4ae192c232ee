"""The ids, tags and file names that a request may use, none of which is a path."""

from __future__ import annotations

import re

ID = re.compile(r"[A-Za-z0-9](?:[A-Za-z0-9_-]|\.(?!\.)){0,63}")
TAG = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,31}")
FILE = re.compile(r"[^/\\\0]{0,200}\.nii(\.gz)?", re.IGNORECASE)


def check_id(value: str) -> str:
    """Returns the id of an image, or raises ValueError.

    >>> check_id("patient-1.view_2")
    'patient-1.view_2'
    """
    if not ID.fullmatch(value) or value.lower().endswith((".nii", ".gz")):
        raise ValueError(
            f"{value[:80]!r} is no id: use up to 64 letters, digits, points, - and _, no suffix"
        )
    return value


def check_tag(value: str) -> str:
    """Returns the tag of a label, or raises ValueError."""
    if not TAG.fullmatch(value):
        raise ValueError(f"{value[:80]!r} is no tag: use up to 32 letters, digits, - and _")
    return value


def check_filename(value: str) -> str:
    r"""Returns the name of a file that was sent, without the path that clients send along.

    >>> check_filename("C:\\cines\\heart.nii.gz")
    'heart.nii.gz'

    Raises:
        ValueError: it is no NIfTI file's name.
    """
    name = re.split(r"[/\\]", value)[-1]
    if not FILE.fullmatch(name):
        raise ValueError(f"{name[-80:]!r} cannot be taken: send .nii.gz or .nii")
    return name
