"""Released weights: where they are, under which licence, and how to fetch them whole."""

from __future__ import annotations

import fcntl
import hashlib
import os
import re
import urllib.parse
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

LOOPBACK = {"localhost", "127.0.0.1", "::1"}
CC_BY_NC = "CC-BY-NC-4.0: no commercial use"
DISCOVR = (
    "MIT, says the README of https://github.com/mdivyanshu97/DISCOVR, which holds no licence file "
    "and whose code builds on VideoMAE's and SIGMA's (CC-BY-NC-4.0): ask before commercial use"
)


class DownloadError(ValueError):
    """A file that cannot be had; the message says why and what to do."""


@dataclass(frozen=True)
class Released:
    """A file of weights that somebody else has published.

    Attributes:
        url: https; a commit in it pins the content, "main" does not.
        licence: what its publishers say about it, or that they say nothing.
        note: what the file holds, and how sure we are of its name and place.
        sha256: 64 hexadecimal digits; None where nobody published the hash, so that the person
            who downloads decides.
    """

    url: str
    licence: str
    note: str
    sha256: str | None = None

    @property
    def file(self) -> str:
        """The last part of the address.

        >>> REGISTRY["mae-vitb16"].file
        'mae_pretrain_vit_base.pth'
        """
        return self.url.rsplit("/", 1)[-1]


def _discovr(epochs: int) -> Released:
    repository = "https://huggingface.co/Div97/DISCOVR_ADULT_PEDIATRIC_MODEL"
    return Released(
        f"{repository}/resolve/main/checkpoint-{epochs - 1}.pth",
        DISCOVR,
        f"DISCOVR ViT-B, EchoNet-Dynamic, EchoPediatric LVH and RVENet, {epochs} epochs; name and "
        "place from the authors' README, the branch is not pinned",
    )


_META = "https://dl.fbaipublicfiles.com"
_README = "place from the authors' code, not pinned"
REGISTRY = {
    **{f"discovr-{epochs}": _discovr(epochs) for epochs in range(200, 801, 100)},
    "videomae-base": Released(
        "https://huggingface.co/MCG-NJU/videomae-base/resolve/"
        "dc740ceda42fce44faed2ea03c6d447db72f6af9/model.safetensors",
        CC_BY_NC,
        "VideoMAE ViT-B, Kinetics-400, 1600 epochs; pinned to a commit",
    ),
    "dino-vits16": Released(
        f"{_META}/dino/dino_deitsmall16_pretrain/dino_deitsmall16_pretrain.pth",
        "Apache-2.0",
        f"DINO ViT-S/16, ImageNet; {_README}",
    ),
    "dino-vitb16": Released(
        f"{_META}/dino/dino_vitbase16_pretrain/dino_vitbase16_pretrain.pth",
        "Apache-2.0",
        f"DINO ViT-B/16, ImageNet; {_README}",
    ),
    "mae-vitb16": Released(
        f"{_META}/mae/pretrain/mae_pretrain_vit_base.pth",
        CC_BY_NC,
        f"MAE ViT-B/16, ImageNet; {_README}",
    ),
}


def cache_folder() -> Path:
    """DISCOVR_MONAI_CACHE, or ``discovr-monai`` in the user's cache folder."""
    own = os.environ.get("DISCOVR_MONAI_CACHE")
    if own:
        return Path(own)
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "discovr-monai"


def licence_beside(path: str | Path) -> str | None:
    """The licence that :func:`download` wrote beside a file; None if there is none."""
    note = beside(Path(path), "licence.txt")
    return note.read_text(encoding="utf-8").strip() if note.is_file() else None


def sha256_of(path: str | Path) -> str:
    """The SHA-256 of a file's content, as 64 hexadecimal digits."""
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def download(
    name: str,
    folder: str | Path | None = None,
    *,
    sha256: str | None = None,
    accept_unverified: bool = False,
) -> Path:
    """The path of a released file, which is fetched from its publisher if it is not there yet.

    Its licence is written beside it (``FILE.licence.txt``), and so is its hash
    (``FILE.sha256``). DISCOVR_MONAI_HUB replaces the publisher's https://host by a mirror's;
    HF_HUB_OFFLINE=1 or DISCOVR_MONAI_OFFLINE=1 forbids to connect.

    Args:
        name: a key of REGISTRY.
        folder: where the file is or is to be; None takes :func:`cache_folder`.
        sha256: the hash that the file must have.
        accept_unverified: whether to take a file whose hash nobody has published.

    Raises:
        DownloadError: the name is unknown, no hash is known, the publisher cannot be reached or
            must not be, the file was cut short, or it has another hash.
    """
    if name not in REGISTRY:
        raise DownloadError(f"{name!r} is no released file that is known: {', '.join(REGISTRY)}")
    entry = REGISTRY[name]
    expected = _expected(entry, sha256)
    target = (cache_folder() if folder is None else Path(folder)) / entry.file
    recorded = recorded_hash(target)
    if not target.is_file() and _offline():
        raise DownloadError(
            f"{entry.file} is not in the folder, and HF_HUB_OFFLINE or DISCOVR_MONAI_OFFLINE "
            "forbids to fetch it: copy it there, or unset the variable"
        )
    if expected is None and not accept_unverified and not (target.is_file() and recorded):
        raise DownloadError(
            f"nobody published a SHA-256 of {entry.file} that is known here: give --sha256, or "
            "take it as it comes with --accept-unverified (its hash is shown and recorded)"
        )
    if target.is_file():
        digest = sha256_of(target)
        if digest != (expected or recorded or digest):
            raise DownloadError(
                f"{entry.file} in the folder has SHA-256 {digest}, not {expected or recorded}: "
                "delete it to fetch it anew, or check the hash"
            )
    else:
        digest = _fetch_whole(entry, target, expected)
    beside(target, "licence.txt").write_text(f"{entry.licence}\n", encoding="utf-8")
    beside(target, "sha256").write_text(f"{digest}  {target.name}\n", encoding="utf-8")
    return target


def _fetch_whole(entry: Released, target: Path, expected: str | None) -> str:
    """Puts the file at ``target`` once it is complete and as expected; returns its hash."""
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(f".{target.name}.part")
    _fetch(_address(entry.url), partial, entry.file)
    digest = sha256_of(partial)
    if expected not in (None, digest):
        _remove(partial)
        raise DownloadError(
            f"{entry.file} has SHA-256 {digest}, not {expected}: removed. It is another "
            "version or was tampered with: ask its publisher"
        )
    partial.replace(target)
    _remove(partial)
    return digest


def beside(path: Path, kind: str) -> Path:
    """``FILE.kind`` in the folder of ``FILE``.

    >>> beside(Path("model.pth"), "sha256").name
    'model.pth.sha256'
    """
    return path.with_name(f"{path.name}.{kind}")


def recorded_hash(target: Path) -> str | None:
    """The SHA-256 that :func:`download` wrote beside a file; None if there is none."""
    note = beside(target, "sha256")
    return note.read_text(encoding="utf-8").split()[0] if note.is_file() else None


def _expected(entry: Released, given: str | None) -> str | None:
    if given is not None and not re.fullmatch(r"[0-9a-fA-F]{64}", given):
        raise DownloadError("--sha256 must be 64 hexadecimal digits")
    if given and entry.sha256 and given.lower() != entry.sha256:
        raise DownloadError(f"{entry.file} is known with SHA-256 {entry.sha256}, not --sha256")
    return given.lower() if given else entry.sha256


def _offline() -> bool:
    names = ("HF_HUB_OFFLINE", "DISCOVR_MONAI_OFFLINE")
    return any(os.environ.get(n, "").lower() not in ("", "0", "false", "no") for n in names)


def _address(url: str) -> str:
    mirror = os.environ.get("DISCOVR_MONAI_HUB")
    if mirror:
        url = mirror.rstrip("/") + urllib.parse.urlsplit(url).path
    return _safe(url)


def _safe(url: str) -> str:
    parts = urllib.parse.urlsplit(url)
    if parts.scheme != "https" and not (parts.scheme == "http" and parts.hostname in LOOPBACK):
        raise DownloadError(f"{parts.scheme}://{parts.hostname}: only https is used for downloads")
    return url


def _fetch(url: str, partial: Path, name: str) -> None:
    """Writes all of ``url`` to ``partial``, going on where an earlier attempt stopped.

    pooch transfers the bytes. ``pooch.retrieve`` would delete a cut file and follow a redirect to
    plain http, so what is kept between attempts and which answers are taken is decided here.
    """
    import pooch
    import requests
    from tqdm import tqdm

    with partial.open("ab") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise DownloadError(f"{name} is being downloaded by another process: wait") from error
        answer = _Answer(file, beside(partial, "etag"), name)
        hostname = urllib.parse.urlsplit(url).hostname
        transfer = pooch.HTTPDownloader(
            progressbar=tqdm(total=1, unit="B", unit_scale=True, disable=None),
            chunk_size=4096,  # a cut connection loses less than this
            headers=answer.request_headers(),
            hooks={"response": answer.check},
            proxies={"no_proxy": hostname} if hostname in LOOPBACK else None,
            timeout=60,
        )
        try:
            transfer(url, file, None)
        except requests.exceptions.ChunkedEncodingError:
            pass  # the connection broke after the answer's beginning: the size below tells
        except requests.RequestException as error:
            reason = error.args[0] if error.args else error
            raise DownloadError(
                f"{name}: the connection failed ({getattr(reason, 'reason', reason)}); the same "
                "command goes on where it stopped"
            ) from error
        file.flush()
        os.fsync(file.fileno())
    size = partial.stat().st_size
    if size != answer.total:
        raise DownloadError(
            f"{name} was cut at {size} of {answer.total} bytes: the same command goes on from there"
        )


class _Answer:
    """What a publisher's answer must be like, given what an earlier attempt left in ``file``."""

    def __init__(self, file: IO[bytes], tag: Path, name: str) -> None:
        self.file, self.tag, self.name = file, tag, name
        self.start = file.tell()
        self.total = 0  # bytes of the whole file, once the publisher has answered

    def request_headers(self) -> dict[str, str]:
        """Asks for the rest only, if the publisher's file is still the same."""
        headers = {"User-Agent": "discovr-monai", "Accept-Encoding": "identity"}
        if self.start and self.tag.is_file():
            headers |= {"Range": f"bytes={self.start}-", "If-Range": self.tag.read_text()}
        return headers

    def check(self, response: Any, **_: Any) -> None:
        """Called by requests for every answer, redirects included, before its content is read."""
        if response.is_redirect:
            _safe(urllib.parse.urljoin(response.url, response.headers["Location"]))
            return
        if response.status_code == 416:  # all is sent: what is here is of something else
            self.file.truncate(0)
        if not response.ok:
            raise DownloadError(
                f"{self.name}: the publisher answers {response.status_code} {response.reason}; it "
                "may have moved, or try again"
            )
        headers = response.headers
        if response.status_code != 206:
            self.start = 0
            self.file.truncate(0)
        elif not headers.get("Content-Range", "").startswith(f"bytes {self.start}-"):
            raise DownloadError(
                f"{self.name}: the publisher sent another part than asked for: try again"
            )
        if "Content-Length" not in headers:
            raise DownloadError(
                f"{self.name}: the publisher does not tell the size, a cut file would pass"
            )
        self.total = self.start + int(headers["Content-Length"])
        etag = headers.get("ETag", "")
        if etag.startswith('"'):  # only strong ones tell that the rest belongs to what is here
            self.tag.write_text(etag)
        else:
            self.tag.unlink(missing_ok=True)


def _remove(partial: Path) -> None:
    partial.unlink(missing_ok=True)
    beside(partial, "etag").unlink(missing_ok=True)
