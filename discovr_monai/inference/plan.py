"""What an archive's inference has to do, cut into parts that do not depend on who does them.

The output folder may be shared, the private one beside it (OUT-private) leads back to the files:

    OUT/inference.json          what was run: model, settings
    OUT/parts/00003.parquet     finished parts, a row per cine
    OUT/embeddings.parquet      all of them, results.csv without the embeddings
    OUT/studies/STUDY/          label maps, overlays, page.html, results.json
    OUT-private/cines.json      relative names, in parts
    OUT-private/files.csv       salted id -> relative name
    OUT-private/bad_files.csv   what was set aside, and why
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from discovr_monai.data.cine import known_name
from discovr_monai.data.datalist import load_rows, walk
from discovr_monai.data.privacy import load_salt, salted_id
from discovr_monai.types import DatalistRow
from discovr_monai.weights import save_atomic


@dataclass(frozen=True)
class Part:
    """Cines that one worker does in one go.

    Attributes:
        number: from 0.
        rows: of the datalist, each with its salted "id".
    """

    number: int
    rows: tuple[DatalistRow, ...]


def find_cines(
    source: str | Path, datalist: str | Path | None = None, section: str | None = None
) -> tuple[Path, list[DatalistRow]]:
    """Root and rows of a folder, a datalist over it, or a single file.

    A folder's datalist.json counts if no other is given. Without one, all files that may be
    cines are taken; what they hold is found out when they are read.

    Args:
        section: of the datalist; None for all of them.

    Raises:
        FileNotFoundError, ValueError: with what to do.
    """
    source = Path(source)
    if not source.exists():
        raise FileNotFoundError(f"dataset_dir {source.name!r} does not exist. Check --dataset_dir")
    if source.is_file():
        return source.parent, [{"image": source.name}]
    own = source / "datalist.json"
    if datalist is None and not own.is_file():
        rows: list[DatalistRow] = [{"image": n} for n in sorted(walk(source)) if known_name(n)]
        if not rows:
            raise ValueError(f"dataset_dir {source.name!r} holds no file that may be a cine")
        return source, rows
    sections = load_rows(own if datalist is None else Path(datalist), source, must_exist=False)
    if section is not None and section not in sections:
        raise ValueError(
            f"the datalist has no section {section!r}; it has {', '.join(map(repr, sections))}"
        )
    chosen = [r for name, rows in sections.items() if section in (None, name) for r in rows]
    unique = {(r["image"], r.get("first")): r for r in chosen}
    return source, list(unique.values())


class Plan:
    """The parts of an output folder; cines that came later are parts of their own.

    Args:
        out: the output folder.
        rows: all cines now.
        about: what decides a row: model, settings. Another ``about`` in the folder is refused.
        part_size: cines in a part.

    Raises:
        ValueError: if the folder holds another model's rows, or is not ours.
    """

    def __init__(
        self, out: Path, rows: Sequence[DatalistRow], about: Mapping[str, Any], part_size: int
    ) -> None:
        if part_size < 1:
            raise ValueError(f"part_size {part_size} must be at least 1")
        self.out, self.private = out, out.with_name(f"{out.name}-private")
        salt = load_salt()
        known = {}
        for row in rows:
            name = f"{row['image']}{row.get('first', '')}"
            known[name] = {**row, "id": salted_id(name, salt)}
        self._claim(dict(about))
        self.parts: list[Part] = []
        for names in self._generations(list(known), part_size):
            there = tuple(known[n] for n in names if n in known)
            self.parts.append(Part(len(self.parts), there))  # type: ignore[arg-type]

    def _claim(self, about: dict[str, Any]) -> None:
        file = self.out / "inference.json"
        remedy = "choose another --output_dir, or remove this one"
        if file.exists():
            try:
                found = json.loads(file.read_text())
            except ValueError:
                found = None
            if found != about:
                differs = next(
                    (k for k in about if (found or {}).get(k) != about[k]), "another version"
                )
                whose = "another model's rows" if differs == "model" else f"another {differs}"
                raise ValueError(f"the output folder {self.out.name!r} holds {whose}: {remedy}")
            return
        there = list(self.out.iterdir()) if self.out.exists() else []
        if any(not p.name.startswith(".") for p in there) and not file.exists():
            raise ValueError(f"the output folder {self.out.name!r} is not empty: {remedy}")
        _write_json(file, about)

    def _generations(self, names: list[str], size: int) -> list[list[str]]:
        """Names in parts: those of earlier runs stay what they were."""
        file = self.private / "cines.json"
        parts: list[list[str]] = json.loads(file.read_text()) if file.exists() else []
        seen = {n for part in parts for n in part}
        new = [n for n in names if n not in seen]
        parts += [new[i : i + size] for i in range(0, len(new), size)]
        if new:
            self.private.mkdir(mode=0o700, parents=True, exist_ok=True)
            _write_json(file, parts)
        return parts

    def file(self, part: Part) -> Path:
        """Where a finished part's rows are."""
        return self.out / "parts" / f"{part.number:05}.parquet"

    def aside(self, part: Part) -> Path:
        """Where a part's unusable files are listed."""
        return self.private / "set_aside" / f"{part.number:05}.json"

    def finished(self) -> list[Part]:
        """Parts whose rows are written."""
        return [p for p in self.parts if self.file(p).exists()]

    def write_aside(self, part: Part, bad: Sequence[tuple[str, str, str, str]]) -> None:
        """Lists a part's unusable files; before its rows, which mark it as finished."""
        _write_json(self.aside(part), list(bad))

    def read_aside(self) -> list[list[str]]:
        """Everything that was set aside: file, kind, reason, what to do."""
        files = [self.aside(p) for p in self.parts]
        return [entry for f in files if f.exists() for entry in json.loads(f.read_text())]


def _write_json(path: Path, content: Any) -> None:
    save_atomic(lambda temporary: _dump(temporary, content), path)


def _dump(path: Path, content: Any) -> None:
    path.write_text(json.dumps(content, indent=1) + "\n")
