"""Released files: where they are, under which licence, and fetching them without half files."""

from __future__ import annotations

import fcntl
import hashlib
import http.client
import os
import re
import urllib.error
import urllib.parse
import urllib.request
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

_FAILURES = (urllib.error.URLError, http.client.HTTPException, TimeoutError, ConnectionError)
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
    """A file of somebody else's.

    Attributes:
        url: https; a commit in it pins the content, "main" does not.
        licence: what its publishers say, and where they do not.
        sha256: None where nobody published it: then the person who downloads decides.
        note: how sure we are of name and place.
    """

    url: str
    licence: str
    note: str
    sha256: str | None = None

    @property
    def file(self) -> str:
        """Its name."""
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
    """What was written down when a file was downloaded."""
    note = beside(Path(path), "licence.txt")
    return note.read_text(encoding="utf-8").strip() if note.is_file() else None


def sha256_of(path: str | Path) -> str:
    """64 hexadecimal digits."""
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def download(
    name: str,
    folder: str | Path | None = None,
    *,
    sha256: str | None = None,
    accept_unverified: bool = False,
) -> Path:
    """A released file, from ``folder`` (or the cache) if it is there, else from its publisher.

    Beside it stand its licence (``FILE.licence.txt``) and the hash that was seen
    (``FILE.sha256``). DISCOVR_MONAI_HUB replaces the publisher's https://host (a mirror);
    HF_HUB_OFFLINE=1 and DISCOVR_MONAI_OFFLINE=1 keep it from connecting.

    Args:
        name: of REGISTRY.
        sha256: the hash that it must have.
        accept_unverified: take it although nobody tells its hash.

    Raises:
        DownloadError: unknown, offline, unreachable, cut short, or of another hash.
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
        found = sha256_of(target)
        if found != (expected or recorded or found):
            raise DownloadError(
                f"{entry.file} in the folder has SHA-256 {found}, not {expected or recorded}: "
                "delete it to fetch it anew, or check the hash"
            )
    else:
        target.parent.mkdir(parents=True, exist_ok=True)
        partial = target.with_name(f".{target.name}.part")
        _fetch(_address(entry.url), partial, entry.file)
        found = sha256_of(partial)
        if expected not in (None, found):
            _remove(partial)
            raise DownloadError(
                f"{entry.file} has SHA-256 {found}, not {expected}: removed. It is another version "
                "or was tampered with: ask its publisher"
            )
        partial.replace(target)
        _remove(partial)
    beside(target, "licence.txt").write_text(f"{entry.licence}\n", encoding="utf-8")
    beside(target, "sha256").write_text(f"{found}  {target.name}\n", encoding="utf-8")
    return target


def beside(path: Path, kind: str) -> Path:
    """``FILE.kind``."""
    return path.with_name(f"{path.name}.{kind}")


def recorded_hash(target: Path) -> str | None:
    """The SHA-256 that was seen when a file was downloaded."""
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


class _Redirects(urllib.request.HTTPRedirectHandler):
    """Follows to https only."""

    def redirect_request(
        self, req: Any, fp: Any, code: int, msg: str, headers: Any, newurl: str
    ) -> Any:
        """See the base class."""
        return super().redirect_request(req, fp, code, msg, headers, _safe(newurl))


def _open(request: urllib.request.Request) -> Any:
    handlers: list[Any] = [_Redirects()]
    if urllib.parse.urlsplit(request.full_url).hostname in LOOPBACK:
        handlers.append(urllib.request.ProxyHandler({}))
    return urllib.request.build_opener(*handlers).open(request, timeout=60)


def _fetch(url: str, partial: Path, name: str) -> None:
    """Writes all of ``url`` to ``partial``, going on where an earlier attempt stopped."""
    tag = beside(partial, "etag")
    with partial.open("ab") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise DownloadError(f"{name} is being downloaded by another process: wait") from error
        headers = {"User-Agent": "discovr-monai"}
        if file.tell() and tag.is_file():  # the rest, if the file is still the same
            headers |= {"Range": f"bytes={file.tell()}-", "If-Range": tag.read_text()}
        try:
            with _open(urllib.request.Request(url, headers=headers)) as response:
                _receive(response, file, tag, name)
        except urllib.error.HTTPError as error:
            if error.code == 416:  # nothing is left to send: what is here is of something else
                file.truncate(0)
            raise DownloadError(
                f"{name}: the publisher answers {error.code} {error.reason}; it may have moved, or "
                "try again"
            ) from error
        except _FAILURES as error:
            reason = getattr(error, "reason", error)
            raise DownloadError(
                f"{name}: the connection failed ({reason}); the same command goes on where it "
                "stopped"
            ) from error


def _receive(response: Any, file: IO[bytes], tag: Path, name: str) -> None:
    from tqdm import tqdm

    start = file.tell()
    if response.status != 206:
        start = 0
        file.truncate(0)
    elif not response.headers.get("Content-Range", "").startswith(f"bytes {start}-"):
        raise DownloadError(f"{name}: the publisher sent another part than asked for: try again")
    length = response.headers.get("Content-Length")
    if length is None:
        raise DownloadError(f"{name}: the publisher does not tell the size, a cut file would pass")
    etag = response.headers.get("ETag", "")
    if etag.startswith('"'):  # only strong ones tell that the rest belongs to what is here
        tag.write_text(etag)
    else:
        tag.unlink(missing_ok=True)
    total = start + int(length)
    with tqdm(total=total, initial=start, unit="B", unit_scale=True, disable=None) as bar:
        while block := response.read(1 << 20):
            bar.update(file.write(block))
    file.flush()
    os.fsync(file.fileno())
    if file.tell() != total:
        raise DownloadError(
            f"{name} was cut at {file.tell()} of {total} bytes: the same command goes on from there"
        )


def _remove(partial: Path) -> None:
    partial.unlink(missing_ok=True)
    beside(partial, "etag").unlink(missing_ok=True)
