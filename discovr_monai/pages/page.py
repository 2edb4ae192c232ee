"""HTML pages of a study (by inference) and of an evaluation, each in one file.

Everything is inside the file: it works offline from any folder, and its Content-Security-Policy
forbids it to load anything or to run any script but its own.
"""

from __future__ import annotations

import base64
import hashlib
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup
from PIL import Image

from discovr_monai.base.files import save_atomic
from discovr_monai.base.notice import NOTICE
from discovr_monai.pages.charts import Curve, draw_curve, headlines_of, metric_tables
from discovr_monai.pages.drawing import UNITS, data_uri, draw_sheets, jpeg, outlines, shrink

STRUCTURES = 6  # as many as there are colours that colour-blind eyes can tell apart
PHASES = {"ED": "End diastole", "ES": "End systole"}


@dataclass(frozen=True, eq=False)
class Nearest:
    """A case that is shown small.

    Attributes:
        title: a salted name.
        similarity: cosine, -1..1; None for a query.
        thumbnail: (h, w) uint8.
        note: is written below, such as "EF 61 %".
    """

    title: str
    similarity: float | None
    thumbnail: np.ndarray
    note: str = ""

    @property
    def picture(self) -> str:
        """The thumbnail as a data URI."""
        return jpeg(_grey(self.thumbnail, 2, f"the thumbnail of {self.title}"))

    @property
    def size(self) -> tuple[int, int]:
        """(width, height)."""
        return self.thumbnail.shape[1], self.thumbnail.shape[0]


@dataclass(frozen=True, eq=False)
class CineView:
    """A cine and what an evaluation or inference says of it.

    Attributes:
        title: a salted name, never a file's.
        frames: (T, H, W) uint8. If a side is longer than 512 pixels, they are shown smaller.
        fps: frames per second, or None.
        labels: (T, H, W) uint8, 0 for background and 1, 2, ... for structures; None where there
            are no contours.
        reference: true labels likewise, drawn dashed; a frame without any is unknown.
        structures: names of labels 1, 2, ..., at most 6. The first one's area is drawn over time.
        spacing: (row, column) mm of these frames' pixels, or None.
        ed, es: frames of end diastole and end systole, from 0; None where unknown.
        ef: (value, low, high) in percent, or None.
        ef_coverage: share of cases whose EF the interval holds, 0..1.
        ef_withheld, contours_withheld: a sentence that says why there is none.
        facts: name -> value, stand under the title.
        nearest: similar cases, most similar first.

    Raises:
        ValueError: where these do not fit together.
    """

    title: str
    frames: np.ndarray
    fps: float | None = None
    labels: np.ndarray | None = None
    reference: np.ndarray | None = None
    structures: Sequence[str] = ()
    spacing: tuple[float, float] | None = None
    ed: int | None = None
    es: int | None = None
    ef: tuple[float, float, float] | None = None
    ef_coverage: float = 0.9
    ef_withheld: str | None = None
    contours_withheld: str | None = None
    facts: Mapping[str, str] = field(default_factory=dict)
    nearest: Sequence[Nearest] = ()

    def __post_init__(self) -> None:
        problem = self._problem()
        if problem:
            raise ValueError(f"{self.title} cannot be drawn: {problem}")
        _grey(self.frames, 3, self.title)

    def _problem(self) -> str | None:
        """What does not fit together, if anything."""
        count = len(self.frames)
        if self.labels is not None:
            if self.labels.shape != self.frames.shape:
                return f"labels {self.labels.shape} are not of the frames' {self.frames.shape}"
            if not 1 <= len(self.structures) <= STRUCTURES:
                return f"{len(self.structures)} structures are named, of 1 to {STRUCTURES}"
            if self.labels.size and self.labels.max() > len(self.structures):
                return f"label {self.labels.max()} has no name among the structures"
            if self.contours_withheld:
                return "contours are both given and withheld"
            if self.reference is not None:
                if self.reference.shape != self.labels.shape:
                    return f"the reference {self.reference.shape} is of another shape"
                if self.reference.max() > len(self.structures):
                    return f"label {self.reference.max()} of the reference has no name"
        elif self.reference is not None:
            return "there is a reference, but no labels"
        if self.ef is not None:
            value, low, high = self.ef
            if self.ef_withheld:
                return "the EF is both given and withheld"
            if not (np.isfinite(self.ef).all() and low <= value <= high):
                return f"EF {value} does not lie in its interval {low} to {high}"
        if self.fps is not None and not (np.isfinite(self.fps) and self.fps > 0):
            return f"frame rate {self.fps} is not above 0"
        if self.spacing is not None and not min(self.spacing) > 0:
            return f"spacing {self.spacing} is not above 0"
        for name, frame in (("ed", self.ed), ("es", self.es)):
            if frame is not None and not 0 <= frame < count:
                return f"{name} {frame} is not among its {count} frames"
        return None

    @cached_property
    def area(self) -> np.ndarray | None:
        """(T,) area of the first structure in :attr:`area_unit`."""
        return None if self.labels is None else self._area(self.labels)

    @cached_property
    def true_area(self) -> np.ndarray | None:
        """(T,) likewise of the reference, NaN where it is unknown."""
        if self.reference is None:
            return None
        known = self.reference.any((1, 2))
        return np.where(known, self._area(self.reference), np.nan)

    def _area(self, labels: np.ndarray) -> np.ndarray:
        pixel = 1.0 if self.spacing is None else self.spacing[0] * self.spacing[1] / 100
        area: np.ndarray = (labels == 1).sum((1, 2)) * pixel
        return area

    @property
    def area_unit(self) -> str:
        """cm² where the spacing is known, else pixels."""
        return "pixels" if self.spacing is None else "cm²"

    @property
    def phases(self) -> dict[str, int]:
        """ "ED" and "ES" -> frame, where known."""
        return {n: f for n, f in (("ED", self.ed), ("ES", self.es)) if f is not None}


def write_study_page(
    path: str | Path,
    title: str,
    cines: Sequence[CineView],
    *,
    notice: str = NOTICE,
    facts: Mapping[str, str] | None = None,
) -> None:
    """Writes a study's page, whole or not at all.

    Args:
        path: of the HTML file. It shows patients' images: keep it where they may be.
        title: a salted name.
        cines: at least one.
        notice: shown on top and on every printed cine.
        facts: of the study and the model, name -> value.
    """
    if not cines:
        raise ValueError("a study's page needs at least one cine")
    views = [_Drawn(cine, i) for i, cine in enumerate(cines, start=1)]
    _write(path, "study.html", title=title, notice=notice, cines=views, facts=dict(facts or {}))


def write_evaluation_page(
    path: str | Path,
    title: str,
    metrics: Sequence[Mapping[str, Any]],
    settings: Mapping[str, Any],
    pictures: Sequence[tuple[Path | bytes, str, str]] = (),
    cines: Sequence[CineView] = (),
    retrieval: Sequence[tuple[Nearest, Sequence[Nearest]]] = (),
    *,
    headlines: Sequence[Mapping[str, Any]] = (),
    notice: str = NOTICE,
) -> None:
    """Writes an evaluation's page, whole or not at all.

    Args:
        path: of the HTML file.
        title: of the task.
        metrics: as in results.json: section, method, label_fraction, metric, value, low, high
            (None where undefined), and samples and patients if known.
        settings: what was evaluated and how. No paths.
        pictures: (PNG, GIF or JPEG, as a file or its bytes; what it shows, for those who do not
            see it; caption).
        cines: players show them with their contours.
        retrieval: queries, each with the cases that are nearest to it.
        headlines: the metrics that sum it up, with "name"; they stand large on top.
        notice: stands on top.
    """
    views = [_Drawn(cine, i) for i, cine in enumerate(cines, start=1)]
    _write(
        path,
        "evaluation.html",
        title=title,
        notice=notice,
        headlines=headlines_of(headlines),
        tables=metric_tables(metrics),
        settings=_flat(settings),
        pictures=[_picture(*p) for p in pictures],
        cines=views,
        retrieval=retrieval,
    )


class _Drawn:
    """A cine as the templates read it."""

    def __init__(self, cine: CineView, number: int) -> None:
        self.view, self.number = cine, number
        self.paths, self.true_paths = (
            None if labels is None else [outlines(m, cine.structures) for m in labels]
            for labels in (cine.labels, cine.reference)
        )
        height, width = cine.frames.shape[1:]
        row, column = cine.spacing or (1.0, 1.0)
        self.stretch = column / row
        self.box = (round(width * self.stretch * UNITS), height * UNITS)  # drawings, (w, h)
        self.ruler = round(10 / row * UNITS) if cine.spacing else 0  # units of a centimetre
        self.curve: Curve | None = None
        if cine.area is not None:
            self.curve = draw_curve(cine.area, cine.fps, cine.phases, cine.true_area)

    @property
    def stills(self) -> list[dict[str, Any]]:
        """Pictures for print and for browsers without scripts: ED and ES, or the first frame."""
        shown = self.view.phases or {"": 0}
        small = shrink(self.view.frames[list(shown.values())])
        return [
            {
                "caption": f"{PHASES.get(phase, 'First frame')}: {self.moment(frame)}",
                "picture": jpeg(picture),
                "paths": self.paths[frame] if self.paths else [],
                "truth": self.true_paths[frame] if self.true_paths else [],
            }
            for (phase, frame), picture in zip(shown.items(), small, strict=True)
        ]

    def moment(self, frame: int) -> str:
        """A frame's number and time, and the area in it."""
        parts = [f"frame {frame + 1}"]
        if self.view.fps:
            parts.append(f"{frame / self.view.fps:.2f} s")
        if self.view.area is not None:
            parts.append(self.measured(frame))
        return ", ".join(parts)

    def measured(self, frame: int) -> str:
        """The area in a frame, with its unit."""
        assert self.view.area is not None
        digits = 0 if self.view.spacing is None else 1
        return f"{self.view.area[frame]:.{digits}f} {self.view.area_unit}"

    @property
    def change(self) -> str | None:
        """Fractional area change from ED to ES, where it is known."""
        area, phases = self.view.area, self.view.phases
        if area is None or len(phases) < 2 or not area[phases["ED"]]:
            return None
        return f"{100 * (1 - area[phases['ES']] / area[phases['ED']]):.0f} %".replace("-", "−")

    @property
    def data(self) -> dict[str, Any]:
        """What player.js needs."""
        view = self.view
        sheets = draw_sheets(view.frames)
        return {
            "pictures": sheets.pictures,
            "cell": sheets.cell,
            "size": sheets.size,
            "columns": sheets.columns,
            "perSheet": sheets.per_sheet,
            "count": len(view.frames),
            "fps": view.fps,
            "phases": view.phases,
            "first": view.phases.get("ED", 0),
            "box": self.box,
            "stretch": self.stretch,
            "ruler": self.ruler,
            "paths": self.paths,
            "truth": self.true_paths,
            "area": None if view.area is None else [round(float(a), 3) for a in view.area],
            "top": None if self.curve is None else self.curve.top,
            "unit": view.area_unit,
        }


def _grey(pixels: np.ndarray, dimensions: int, name: str) -> np.ndarray:
    """Returns the array, or raises a ValueError if it does not hold grey pixels."""
    if pixels.dtype != np.uint8 or pixels.ndim != dimensions or 0 in pixels.shape:
        raise ValueError(
            f"{name} cannot be drawn: {pixels.dtype} {pixels.shape} is not uint8 of "
            f"{'(T, H, W)' if dimensions == 3 else '(h, w)'}, with something in it"
        )
    return pixels


def _flat(settings: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """Nested settings as dotted names and text."""
    flat: dict[str, str] = {}
    for key, value in settings.items():
        name = f"{prefix}{key}"
        if isinstance(value, Mapping) and value:
            flat |= _flat(value, f"{name}.")
        elif isinstance(value, (list, tuple)):
            flat[name] = ", ".join(map(str, value))
        else:
            flat[name] = "none" if value is None else str(value)
    return flat


def _picture(source: Path | bytes, alt: str, caption: str) -> dict[str, Any]:
    """A picture for the template, and a GIF's first frame for those who want no motion.

    Raises:
        ValueError: naming the file that is missing or is no picture.
    """
    name = source.name if isinstance(source, Path) else f"the picture {caption!r}"
    try:
        content = source.read_bytes() if isinstance(source, Path) else source
        uri = data_uri(content)
        with Image.open(io.BytesIO(content)) as image:
            size, still = image.size, None
            if getattr(image, "is_animated", False):
                written = io.BytesIO()
                image.convert("RGB").save(written, "PNG", optimize=True)
                still = data_uri(written.getvalue())
    except (ValueError, OSError) as error:
        reason = "does not exist" if isinstance(error, FileNotFoundError) else "is no picture"
        raise ValueError(f"{name} {reason}: give a PNG, GIF or JPEG") from error
    return {"uri": uri, "still": still, "size": size, "alt": alt, "caption": caption}


def _write(path: str | Path, template: str, **content: Any) -> None:
    """Fills a template; its policy allows our script and style by their hashes."""
    here = resources.files("discovr_monai.pages")
    parts = {n: (here / n).read_text(encoding="utf-8") for n in ("player.js", "style.css")}
    environment = Environment(
        loader=PackageLoader("discovr_monai.pages", ""),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.policies["json.dumps_kwargs"] = {"separators": (",", ":"), "allow_nan": False}
    page = environment.get_template(template).render(
        script=Markup(parts["player.js"]),
        style=Markup(parts["style.css"]),
        script_hash=_sha256(parts["player.js"]),
        style_hash=_sha256(parts["style.css"]),
        **content,
    )
    encoded = page.encode("utf-8", "backslashreplace")  # any name can be shown

    def write(temporary: Path) -> None:
        temporary.write_bytes(encoded)

    save_atomic(write, Path(path))


def _sha256(text: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
