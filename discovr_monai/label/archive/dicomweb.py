"""Cines out of a DICOMweb archive, and labels into it: QIDO-RS, WADO-RS and STOW-RS.

What an archive gives names its patients and is not changed, so the folder is for its owner only.
Nothing here prints or logs a UID, a name or a number of a patient; the two reports name files, and
lie beside them.
"""

from __future__ import annotations

import base64
import logging
import os
import re
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import product
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import urlsplit

from discovr_monai.base.files import save_atomic
from discovr_monai.base.privacy import is_loopback
from discovr_monai.base.tables import write_table
from discovr_monai.data.read.kinds import is_dicom
from discovr_monai.data.write.derived import quiet
from discovr_monai.data.write.segmentation import STILLS

T = TypeVar("T")
TOKEN, USER, PASSWORD = (f"DISCOVR_MONAI_DICOMWEB_{n}" for n in ("TOKEN", "USER", "PASSWORD"))
CINES = ("1.2.840.10008.5.1.4.1.1.3.1", "1.2.840.10008.5.1.4.1.1.3")  # today's and the retired one
UID = re.compile(r"(?=.{3,64}$)[0-9]+(\.[0-9]+)+")
STUDY, SERIES, INSTANCE = "0020000D", "0020000E", "00080018"
MODALITIES, MODALITY = "00080061", "00080060"
SOP_CLASS, FRAMES = "00080016", "00280008"
PAGE = 1000  # results that are asked for at once
TIMEOUTS = (10, 120)  # seconds: to connect; between two bytes
BUSY = (429, 502, 503, 504)  # HTTP: nobody can answer for now
DUPLICATE = 0x0111  # failure reason of an instance that the archive has (PS3.7, annex C)


class ArchiveError(ValueError):
    """What an archive did not do.

    Attributes:
        away: nobody answered, or the archive was too busy.
        final: everything else would fail as well (credentials, certificate, a redirect).
    """

    def __init__(self, sentence: str, *, away: bool = False, final: bool = False) -> None:
        super().__init__(sentence)
        self.away, self.final = away, final


def pull(
    url: str,
    folder: str | Path,
    studies: Sequence[str] = (),
    patients: Sequence[str] = (),
    *,
    plain_http: bool = False,
) -> Counter[str]:
    """Fetches multi-frame ultrasound as STUDY/INSTANCE.dcm, named by UIDs, as it was stored.

    Files that exist are not fetched again. An instance that cannot be had is named with the reason
    in bad_files.csv, and the rest goes on.

    Args:
        url: the archive's DICOMweb root.
        folder: new, or of an earlier pull.
        studies: Study Instance UIDs; all if empty.
        patients: Patient IDs; all if empty.
        plain_http: lets patients' data go unencrypted to another machine.

    Returns:
        How many were "fetched", "there" already, "set aside".

    Raises:
        ArchiveError, ValueError, OSError: with what to do.
    """
    if any(not UID.fullmatch(uid) for uid in studies):
        raise ValueError("--study takes a Study Instance UID: digits and dots, 64 at most")
    archive, folder = Archive(url, plain_http), Path(folder)
    cines = {f"{uids[0]}/{uids[2]}.dcm": uids for uids in archive.cines(studies, patients)}
    if not cines:
        raise ArchiveError(
            f"{archive.host} has no multi-frame ultrasound of what was asked for: check the "
            "address, --study and --patient, and what this user may see"
        )
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    for left in folder.glob("*/.*.tmp"):  # of a pull that was killed
        left.unlink()
    todo = [name for name in cines if not (folder / name).is_file()]
    counts, bad = Counter({"there": len(cines) - len(todo)}), []
    try:
        for name, why in _each(todo, lambda name: archive.fetch(*cines[name], folder / name)):
            counts["set aside" if why else "fetched"] += 1
            if why:
                bad.append((name, why))
    finally:
        write_table(folder / "bad_files.csv", ("file", "reason"), bad)
    return counts


def push(folder: str | Path, url: str, *, plain_http: bool = False) -> Counter[str]:
    """Stores a folder's DICOM files; what became of each stands in pushed.csv beside them.

    This may be repeated: an instance that the archive has counts as stored.

    Args:
        folder: such as ``discovr-monai labels --dicom`` writes.
        url, plain_http: see :func:`pull`.

    Returns:
        How many were "stored", "refused".

    Raises:
        ArchiveError, ValueError, OSError: with what to do.
    """
    archive, folder = Archive(url, plain_http), Path(folder)
    if not folder.is_dir():
        raise NotADirectoryError(f"{folder.name!r} is no folder. Give the one with the DICOM files")
    files = [p for p in sorted(folder.rglob("[!.]*")) if p.is_file() and is_dicom(p)]
    if not files:
        raise ValueError(f"{folder.name!r} holds no DICOM: write it by labels --dicom")
    counts: Counter[str] = Counter()
    rows = []
    try:
        for path, why in _each(files, archive.store):
            counts["refused" if why else "stored"] += 1
            rows.append((str(path.relative_to(folder)), why or "stored"))
    finally:
        write_table(folder / "pushed.csv", ("file", "result"), rows)
    return counts


class Archive:
    """A DICOMweb archive; everything that goes wrong with it becomes an :class:`ArchiveError`.

    Credentials come from the environment: a bearer token, or a user and a password. As redirects
    are not followed, they are sent to nobody else.

    Args:
        url: the archive's root, such as https://HOST/dicom-web.
        plain_http: see :func:`pull`.

    Raises:
        ValueError: the address is none, or is not safe.
    """

    def __init__(self, url: str, plain_http: bool = False) -> None:
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname or parts.query:
            raise ValueError("the archive's address must be like https://HOST/dicom-web")
        if "@" in parts.netloc:
            raise ValueError(f"the address holds credentials: set {USER} and {PASSWORD} instead")
        local = is_loopback(parts.hostname)
        if parts.scheme == "http" and not local and not plain_http:
            raise ValueError(
                f"http to {parts.hostname} can be read on the way: use https, or --plain-http "
                "where the network is trusted"
            )
        self.host = parts.netloc
        self.client = self._client(url.rstrip("/"), proxies=not local)

    @staticmethod
    def _client(url: str, proxies: bool) -> Any:
        try:
            import requests
            from dicomweb_client import DICOMwebClient
        except ImportError:
            raise ValueError("dicomweb-client is not installed: make label") from None
        for name in ("dicomweb_client", "retrying"):  # they log UIDs and tracebacks
            logging.getLogger(name).setLevel(logging.CRITICAL)
        header = credentials()

        def sign(request: Any) -> Any:  # set even without a header: ~/.netrc is left alone
            if header:
                request.headers["Authorization"] = header
            return request

        def shorten_type(response: Any, **_: Any) -> None:
            """The client does not know this type with a character set behind it."""
            if response.headers.get("Content-Type", "").startswith("application/dicom+json"):
                response.headers["Content-Type"] = "application/dicom+json"

        session = requests.Session()
        session.auth, session.trust_env, session.max_redirects = sign, proxies, 0
        session.headers["Accept"] = "application/dicom+json"
        client = DICOMwebClient(
            url,
            session,
            callback=shorten_type,
            chunk_size=1 << 31,  # requests go in one piece: some servers take no chunks
            permissive_uid=True,
            timeout=TIMEOUTS,
        )
        client.set_http_retry_params(retry=False)
        return client

    @contextmanager
    def _asking(self) -> Iterator[None]:
        from requests.exceptions import RequestException

        try:
            with quiet(), warnings.catch_warnings():
                warnings.simplefilter("ignore")
                yield
        except ArchiveError:
            raise
        except RequestException as error:
            raise failure(error, self.host) from None
        except OSError:  # our disk
            raise
        except Exception as error:  # what is no DICOM fails in many ways
            raise ArchiveError(
                f"{self.host} sends what is no DICOM ({type(error).__name__})"
            ) from None

    def cines(self, studies: Sequence[str], patients: Sequence[str]) -> list[tuple[str, str, str]]:
        """Study, series and instance UIDs of multi-frame ultrasound."""
        from tqdm import tqdm

        chosen: dict[str, None] = {}
        for study, patient in product(studies or [""], patients or [""]):
            wanted = {"StudyInstanceUID": study, "PatientID": patient}
            for entry in self._search("studies", STUDY, **wanted):
                # a filter by modality makes Orthanc 1.10 lose studies of a page, and others refuse
                if "US" in (entry.get(MODALITIES, {}).get("Value") or ["US"]):
                    chosen[_value(entry, STUDY)] = None
        cines = []
        for study in tqdm(chosen, desc="studies looked at", disable=None):
            for entry in self._search("series", SERIES, study, Modality="US"):
                series = _value(entry, SERIES)
                if _value(entry, MODALITY) in ("", "US"):  # some ignore the filter
                    instances = self._search("instances", INSTANCE, study, series)
                    uids = [_value(one, INSTANCE) for one in instances if is_multiframe(one)]
                    cines += [(study, series, uid) for uid in uids]
        return cines

    def _search(self, level: str, key: str, *within: str, **filters: str) -> list[dict[str, Any]]:
        """All results of a level, fetched page by page; each has a UID at the tag ``key``."""
        search = getattr(self.client, f"search_for_{level}")
        filters = {name: value for name, value in filters.items() if value}
        fields = ["NumberOfFrames"] if level == "instances" else None
        entries: dict[str, dict[str, Any]] = {}
        offset, last = 0, None
        while True:
            try:
                with self._asking():
                    page = search(
                        *within, limit=PAGE, offset=offset, fields=fields, search_filters=filters
                    )
                    new = {_value(entry, key): entry for entry in page}
                    if "" in new:
                        raise KeyError(key)
            except ArchiveError as error:
                if error.away or error.final:
                    raise
                raise ArchiveError(
                    f"{error} to a DICOMweb search: check the address (Orthanc's ends in "
                    "/dicom-web)"
                ) from None
            if not page or page == last:  # the end, or a server that knows no offset
                return list(entries.values())
            offset, last = offset + len(page), page
            entries |= new  # Orthanc lists a study once for each patient it is filed under

    def fetch(self, study: str, series: str, instance: str, path: Path) -> None:
        """Fetches one instance into a file, whole or not at all, compressed as it is stored."""
        if not all(UID.fullmatch(uid) for uid in (study, series, instance)):
            raise ArchiveError("its UIDs are not valid")  # they could lead out of the folder
        with self._asking():
            dataset = self.client.retrieve_instance(
                study, series, instance, media_types=(("application/dicom", "*"),)
            )
            if not is_whole(dataset):
                raise ArchiveError("its pixels are missing or cut short")
            if str(dataset.get("SOPInstanceUID")) != instance:
                raise ArchiveError(f"{self.host} sends another instance than was asked for")
            save_atomic(dataset.save_as, path)

    def store(self, path: Path) -> None:
        """Stores one DICOM file."""
        import pydicom
        from requests.exceptions import HTTPError

        with self._asking():
            try:
                dataset = pydicom.dcmread(path)
            except OSError:
                raise
            except Exception:
                raise ArchiveError("it is not valid DICOM (damaged or cut short)") from None
            try:
                answer = self.client.store_instances([dataset])
            except HTTPError as error:
                refusal: Any = error.response
                if refusal.status_code != 409:
                    raise
                answer = pydicom.Dataset.from_json(refusal.json())
            for item in answer.get("FailedSOPSequence") or ():
                if (reason := int(item.get("FailureReason") or 0)) != DUPLICATE:
                    raise ArchiveError(f"{self.host} refuses it (failure reason {reason:04X}H)")


def credentials() -> str:
    """The Authorization header that the environment gives; "" without."""
    token, user, password = (os.environ.get(n, "").strip() for n in (TOKEN, USER, PASSWORD))
    if token:
        return f"Bearer {token}"
    if bool(user) != bool(password):
        raise ValueError(f"set both {USER} and {PASSWORD}, or {TOKEN}")
    return "Basic " + base64.b64encode(f"{user}:{password}".encode()).decode() if user else ""


def failure(error: Any, host: str) -> ArchiveError:
    """A sentence for what requests raises; its own would quote addresses with UIDs."""
    from requests import exceptions

    away = final = False
    if isinstance(error, exceptions.HTTPError):
        code: int = getattr(error.response, "status_code", 0)
        away, final = code in BUSY, code in (401, 403)
        sentence = f"{host} answers {code}"
        if final:
            remedy = f"set {TOKEN}, or {USER} and {PASSWORD}"
            sentence = f"{host} wants other credentials ({code}): {remedy}"
    elif isinstance(error, exceptions.SSLError):
        remedy = "name its authority in REQUESTS_CA_BUNDLE"
        sentence, final = f"the certificate of {host} is not trusted: {remedy}", True
    elif isinstance(error, exceptions.TooManyRedirects):
        remedy = "give the address where it ends"
        sentence, final = f"{host} leads elsewhere (redirect): {remedy}", True
    elif isinstance(error, exceptions.JSONDecodeError):
        sentence = f"{host} answers no JSON"
    else:
        remedy = "is it running, and the address right?"
        sentence, away = f"{host} does not answer ({type(error).__name__}): {remedy}", True
    return ArchiveError(sentence, away=away, final=final)


def is_multiframe(entry: dict[str, Any]) -> bool:
    """Whether a search's result is a cine, by its class and, where known, its number of frames."""
    frames, kind = _value(entry, FRAMES), _value(entry, SOP_CLASS)
    many = frames.isdigit() and int(frames) > 1
    return (kind in CINES and (many or not frames)) or (kind in STILLS and many)


def is_whole(dataset: Any) -> bool:
    """Whether all pixels are there: pydicom reads a file that is cut short without them."""
    from pydicom.pixels.utils import get_expected_length

    pixels = dataset.get("PixelData")
    compressed = dataset.file_meta.TransferSyntaxUID.is_compressed
    return bool(pixels) and (compressed or len(pixels) >= get_expected_length(dataset))


def _value(entry: Any, tag: str) -> str:
    """The first value of an element in DICOM's JSON; "" without."""
    values = entry.get(tag, {}).get("Value") or [""]
    return str(values[0])


def _each(items: Sequence[T], work: Callable[[T], None]) -> Iterator[tuple[T, str]]:
    """Works on one item after the other, and says why each could not be done ("" if it was).

    Raises:
        ArchiveError: the rest would fail as well, or the archive did not answer twice in a row.
    """
    from tqdm import tqdm

    away = done = 0
    for number, item in enumerate(tqdm(items, unit="file", disable=None), 1):
        try:
            work(item)
        except ArchiveError as error:
            away = away + 1 if error.away else 0
            yield item, str(error)
            if error.final or away == 2 or (away and number == len(items)):
                raise ArchiveError(
                    f"{error} {done} of {len(items)} are done: the same command goes on from there"
                ) from None
        else:
            away, done = 0, done + 1
            yield item, ""
