"""Salted identifiers: the same for the same patient, useless without the user's salt."""

from __future__ import annotations

import hashlib
import hmac
import ipaddress
import os
import secrets
from pathlib import Path

from discovr_monai.base.files import PRIVATE, write_text

SALT_VARIABLE = "DISCOVR_MONAI_SALT"
ID_DIGITS = 16  # hexadecimal digits of a salted id: 64 bits


def load_salt(path: str | Path | None = None) -> bytes:
    """The user's salt: $DISCOVR_MONAI_SALT, else a private file that is made once.

    Args:
        path: the file; ``~/.config/discovr-monai/salt`` if None.

    Raises:
        OSError: if the file can neither be read nor made.
    """
    if path is None and (value := os.environ.get(SALT_VARIABLE)):
        return value.encode()
    config = Path(os.environ.get("XDG_CONFIG_HOME", Path.home() / ".config"))
    file = Path(path) if path is not None else config / "discovr-monai" / "salt"
    if not file.exists():
        file.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        write_text(file, secrets.token_hex(32), mode=PRIVATE, replace=False)
    return file.read_text().strip().encode()


def salted_id(value: str, salt: bytes, length: int = ID_DIGITS) -> str:
    """HMAC-SHA256 of ``value`` under ``salt``, the first ``length`` hexadecimal digits.

    64 bits, the default, hold ten million ids with a chance of 3 in a million that any two are
    the same.

    >>> salted_id("patient 7", b"salt")
    '19fdf60fac41922e'
    >>> salted_id("patient 7", b"another salt") == salted_id("patient 7", b"salt")
    False
    """
    return hmac.new(salt, value.encode("utf-8", "surrogateescape"), hashlib.sha256).hexdigest()[
        :length
    ]


def is_shortened_id(stored: object, current: str) -> bool:
    """Whether ``stored`` is ``current`` as an earlier version cut it, after 12 digits.

    >>> is_shortened_id("0123456789ab", "0123456789abcdef")
    True
    >>> is_shortened_id("0123456789abcdef", "0123456789abcdef")
    False
    """
    return isinstance(stored, str) and len(stored) < len(current) and stored == current[:12]


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach a server that is bound to ``host``."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
