"""The cines of an inference, cut into parts that any worker can do.

The output folder names no patient, although its pictures show what the cines show. The private
folder beside it (OUT-private) tells which results belong to which file:

    OUT/inference.json          what was run: model, settings
    OUT/parts/00003.parquet     finished parts, a row per cine
    OUT/embeddings.parquet      the rows of all parts; results.csv has them without embeddings
    OUT/studies/STUDY/          label maps, overlays, page.html, results.json
    OUT-private/cines/0000.json relative names in parts; 0001.json if cines were added later
    OUT-private/files.csv       salted id -> relative name
    OUT-private/bad_files.csv   which files were set aside, and why
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from discovr_monai.base.files import write_text
from discovr_monai.base.privacy import is_shortened_id, load_salt, salted_id
from discovr_monai.base.types import DatalistRow
from discovr_monai.data.lists.datalist import load_rows
from discovr_monai.data.read.kinds import known_name, walk


@dataclass(frozen=True)
class ArchivePart:
    """Cines whose results one worker writes in one file.

    Attributes:
        number: the part's place among all parts, from 0.
        rows: datalist rows, each with the cine's salted "id".
    """

    number: int
    rows: tuple[DatalistRow, ...]


def find_cines(
    source: str | Path, datalist: str | Path | None = None, section: str | None = None
) -> tuple[Path, list[DatalistRow]]:
    """The root folder and the datalist rows of what inference shall look at.

    Args:
        source: a folder, or a single file.
        datalist: lists the folder's cines; None takes its datalist.json. Without either, every
            file is taken whose name may be a cine's; its content shows when it is read.
        section: the datalist's section to take; None takes all.

    Returns:
        The folder, and rows whose "image" is relative to it.

    Raises:
        FileNotFoundError: ``source`` does not exist.
        ValueError: there is no such section, or no file that may be a cine.
    """
    source = Path(source)
    if not source.exists():
        raise FileNotFoundError(f"dataset_dir {source.name!r} does not exist. Check --dataset_dir")
    if source.is_file():
        source = source.resolve()
        return source.parent, [{"image": source.name}]
    default = source / "datalist.json"
    if datalist is None and not default.is_file():
        rows: list[DatalistRow] = [{"image": n} for n in sorted(walk(source)) if known_name(n)]
        if not rows:
            raise ValueError(f"dataset_dir {source.name!r} holds no file that may be a cine")
        return source, rows
    sections = load_rows(default if datalist is None else Path(datalist), source, must_exist=False)
    if section is not None and section not in sections:
        raise ValueError(
            f"the datalist has no section {section!r}; it has {', '.join(map(repr, sections))}"
        )
    chosen = [r for name, rows in sections.items() if section in (None, name) for r in rows]
    unique = {(r["image"], r.get("first")): r for r in chosen}
    return source, list(unique.values())


class Plan:
    """The parts of an output folder.

    Which cines a part holds is written by whichever worker comes first, and never changes; cines
    that were added to the source later get parts of their own.

    Args:
        out: the output folder.
        root: the folder that the rows' names are relative to.
        rows: all cines of the source. Those that lie in ``out`` itself are left out.
        about: the model and the settings that decide a result.
        part_size: cines in a part.

    Raises:
        ValueError: the folder holds results of another model, source, salt or other settings, or
            files of other origin, or cines have changed since they were read.
    """

    def __init__(
        self,
        out: Path,
        root: Path,
        rows: Sequence[DatalistRow],
        about: Mapping[str, Any],
        part_size: int,
    ) -> None:
        if part_size < 1:
            raise ValueError(f"part_size {part_size} must be at least 1")
        self.out, self.private = out, out.with_name(f"{out.name}-private")
        self.salt = load_salt()
        outputs = (out.resolve(), self.private.resolve())
        by_name: dict[str, DatalistRow] = {}
        for row in rows:
            path = (root / row["image"]).absolute()
            if not any(path.is_relative_to(folder) for folder in outputs):
                by_name[_name(row)] = {**row, "id": self.id_of(_name(row))}  # type: ignore[typeddict-item]
        where = {
            "salt": salted_id("inference", self.salt),
            "source": salted_id(f"source {root.resolve()}", self.salt),
        }
        self._claim({**about, **where})
        stamps = {name: _stamp(root, row) for name, row in by_name.items()}
        self.parts: list[ArchivePart] = []
        self.names: list[list[str]] = self._generations(stamps, part_size)
        for names in self.names:
            present = tuple(by_name[n] for n in names if n in by_name)
            self.parts.append(ArchivePart(len(self.parts), present))

    def id_of(self, name: str) -> str:
        """The salted id of a cine that the plan calls ``name`` (see ``_name``)."""
        return salted_id(name.replace("#", ""), self.salt)

    def _claim(self, about: dict[str, Any]) -> None:
        file = self.out / "inference.json"
        remedy = "choose another --output_dir, or remove this one"
        if not file.exists():
            content = list(self.out.iterdir()) if self.out.exists() else []
            # another worker may have written the file in the meantime
            if any(not p.name.startswith(".") for p in content) and not file.exists():
                raise ValueError(f"the output folder {self.out.name!r} is not empty: {remedy}")
            _publish(file, about)
        try:
            written = json.loads(file.read_text())
        except ValueError:
            written = {}
        if written == about:
            return
        if is_shortened_id(written.get("salt"), about["salt"]):
            raise ValueError(
                f"the output folder {self.out.name!r} was made with shorter ids by an earlier "
                f"version: {remedy}"
            )
        differs = next((k for k in about if written.get(k) != about[k]), "another version")
        why = {
            "model": "another model's rows",
            "source": "the rows of another source",
            "salt": "ids of another salt (set DISCOVR_MONAI_SALT to the same on every machine)",
        }.get(differs, f"rows of another {differs}")
        raise ValueError(f"the output folder {self.out.name!r} holds {why}: {remedy}")

    def _generations(self, stamps: dict[str, str], size: int) -> list[list[str]]:
        """The names in each part: first those of earlier runs as they were, then new ones."""
        folder = self.private / "cines"
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        if any((self.out / "parts").glob("*.parquet")) and not any(folder.iterdir()):
            raise ValueError(
                f"{self.private.name} has gone, without which {self.out.name!r} cannot be gone on "
                "with: put it back, or choose another --output_dir"
            )
        while True:
            parts: list[dict[str, str]] = []
            number = 0
            while (file := folder / f"{number:04}.json").exists():
                parts += json.loads(file.read_text())
                number += 1
            seen = {name: stamp for part in parts for name, stamp in part.items()}
            changed = sum(stamps.get(name, stamp) != stamp for name, stamp in seen.items())
            if changed:
                raise ValueError(
                    f"{changed} cines have changed since they were read (the files, or what the "
                    "datalist says of them): choose another --output_dir"
                )
            new = [(n, s) for n, s in stamps.items() if n not in seen]
            if not new:
                return [list(part) for part in parts]
            _publish(file, [dict(new[i : i + size]) for i in range(0, len(new), size)])

    def file(self, part: ArchivePart) -> Path:
        """The file of a finished part's rows."""
        return self.out / "parts" / f"{part.number:05}.parquet"

    def aside(self, part: ArchivePart) -> Path:
        """The list of a part's unusable files."""
        return self.private / "set_aside" / f"{part.number:05}.json"

    def finished(self) -> set[int]:
        """Numbers of the parts whose rows are written."""
        files = (self.out / "parts").glob("*.parquet")
        return {int(file.stem) for file in files if file.stem.isdigit()}

    def write_aside(self, part: ArchivePart, bad: Sequence[tuple[str, str, str, str]]) -> None:
        """Lists a part's unusable files. Call it before the rows are written: they end a part."""
        write_text(self.aside(part), json.dumps(list(bad), indent=1) + "\n")

    def read_aside(self) -> list[list[str]]:
        """All files that were set aside: name, kind, reason, what to do."""
        files = [self.aside(p) for p in self.parts]
        return [entry for f in files if f.exists() for entry in json.loads(f.read_text())]


def _name(row: DatalistRow) -> str:
    """What the plan calls a cine: its file, and its first frame in a shard of several cines."""
    return f"{row['image']}#{row['first']}" if "first" in row else row["image"]


def _stamp(root: Path, row: DatalistRow) -> str:
    """A text that changes with the file's size or time, and with its datalist row."""
    path = root / row["image"]
    stat = path.stat() if path.exists() else None
    size = (stat.st_size, stat.st_mtime_ns) if stat else None
    text = json.dumps([size, row], sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _publish(path: Path, content: Any) -> None:
    """Writes JSON, unless another worker has written the file before: then that one stays."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
    try:
        temporary.write_text(json.dumps(content, indent=1) + "\n")
        with contextlib.suppress(FileExistsError):
            os.link(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
