"""The files that a study gets beside its rows in the table: label maps, overlays and a page."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from discovr_monai.base.files import save_atomic, write_text
from discovr_monai.base.notice import NOTICE
from discovr_monai.base.types import CineError, DatalistRow
from discovr_monai.data.read.kinds import is_dicom
from discovr_monai.data.read.masks import read_masks, window_masks
from discovr_monai.data.write.labels import (
    full_frame_labels,
    write_dicom_labels,
    write_nifti_labels,
)
from discovr_monai.inference.findings import Finding
from discovr_monai.inference.model import EchoModel
from discovr_monai.inference.parquet import read_embeddings, read_parquet
from discovr_monai.inference.plan import Plan
from discovr_monai.inference.reading import CineReader, Seen
from discovr_monai.inference.search import nearest_cases
from discovr_monai.pages.charts import metric_name
from discovr_monai.pages.drawing import SHOWN, resize_labels
from discovr_monai.pages.overlay import save_overlay
from discovr_monai.pages.page import CineView, Nearest, write_study_page

NEAREST = 6  # similar cines that a page shows beside each cine
SHOWN_CINES = 24  # a page shows at most so many cines


class StudyWriter:
    """Writes below OUT/studies. DICOM files name the patient, so they go into OUT-private.

    Args:
        plan: the plan of the output folder.
        reader: reads the cines again for the pages.
        model: the model that made the findings.
        label_maps: whether to write NIfTI, and DICOM for DICOM sources.
        overlays: whether to write an animation of each segmented cine.
        pages: the largest number of studies that get a page.
    """

    def __init__(
        self,
        plan: Plan,
        reader: CineReader,
        model: EchoModel,
        *,
        label_maps: bool,
        overlays: bool,
        pages: int,
    ) -> None:
        self.plan, self.reader, self.model = plan, reader, model
        self.label_maps, self.overlays, self.pages = label_maps, overlays, pages

    def keep(self, finding: Finding) -> None:
        """Writes a cine's label maps and overlay; if that fails, its row tells why."""
        if finding.labels is None:
            return
        try:
            self._write_labels(finding, finding.labels)
        except Exception as error:  # one source's odd header must not end an archive's run
            reason = error.problem if isinstance(error, CineError) else type(error).__name__
            finding.values["contours_withheld"] = f"they could not be written ({reason})"

    def _write_labels(self, finding: Finding, labels: np.ndarray) -> None:
        seen = finding.seen
        folder, name = self.plan.out / "studies" / seen.study, str(seen.row["id"])
        folder.mkdir(parents=True, exist_ok=True)
        source = self.reader.loader.root / seen.row["image"]
        if self.label_maps:
            full = full_frame_labels(labels, seen.window)
            like = source if source.name.lower().endswith((".nii", ".nii.gz")) else None
            write_nifti_labels(
                folder / f"{name}.nii.gz", full, seen.spacing, seen.fps, like, name=name
            )
            if is_dicom(source):
                private = self.plan.private / "studies" / seen.study
                private.mkdir(parents=True, exist_ok=True)
                structures, sha256 = self.model.structures, self.model.sha256
                finding.values["dicom"] = write_dicom_labels(
                    private / f"{name}.dcm", full, structures, source, sha256, name=name
                )
        if self.overlays:
            frames = np.asarray(seen.cine[0])

            def write(temporary: Path) -> None:
                save_overlay(temporary, frames, labels, None, seen.fps or 15.0, NOTICE)

            save_atomic(write, folder / f"{name}.gif")

    def finish(self) -> int:
        """Writes the first studies' pages and JSON from the joined table; returns how many."""
        if not self.pages:
            return 0
        file = self.plan.out / "embeddings.parquet"
        table = read_parquet(file, leave_out=("embedding",))
        studies: dict[str, list[dict[str, Any]]] = {}
        for row in table:
            studies.setdefault(row["study"], []).append(row)
        chosen = list(studies.items())[: self.pages]
        wanted = {row["id"] for _, cines in chosen for row in cines[:SHOWN_CINES]}
        cases = nearest_cases(table, read_embeddings(file), NEAREST, wanted)
        rows = {r["id"]: r for part in self.plan.parts for r in part.rows}
        for study, cines in tqdm(chosen, desc="pages", unit="study"):
            folder = self.plan.out / "studies" / study
            folder.mkdir(parents=True, exist_ok=True)
            self._json(folder / "results.json", study, cines)
            views = [
                self._view(cine, rows.get(cine["id"]), table, cases[cine["id"]])
                for cine in cines[:SHOWN_CINES]
            ]
            shown = [v for v in views if v is not None]
            count = str(len(cines))
            if len(shown) < len(cines):
                count += f", of which {len(shown)} are shown"
            if shown:
                facts = {"Model": self.model.sha256, "Cines": count}
                write_study_page(folder / "page.html", f"Study {study}", shown, facts=facts)
        return len(chosen)

    def _json(self, path: Path, study: str, cines: list[dict[str, Any]]) -> None:
        kept = [{k: v for k, v in c.items() if k != "thumbnail"} for c in cines]
        content = {"notice": NOTICE, "model": self.model.sha256, "study": study, "cines": kept}
        write_text(path, json.dumps(content, indent=1) + "\n")

    def _view(
        self,
        cine: dict[str, Any],
        row: DatalistRow | None,
        table: list[dict[str, Any]],
        cases: list[tuple[int, float]],
    ) -> CineView | None:
        """A cine for a page, read again at the page's size; None if its file has gone since."""
        if row is None:
            return None
        reading = self.reader.at(SHOWN)(row)
        if "seen" not in reading:
            return None
        seen: Seen = reading["seen"]
        scale = max(seen.window[4:6]) / SHOWN
        has_ef = cine.get("ef") is not None
        ef = (cine["ef"], cine["ef_low"], cine["ef_high"]) if has_ef else None
        return CineView(
            title=f"Cine {cine['id']}",
            frames=np.asarray(seen.cine[0]),
            fps=seen.fps,
            labels=None if cine.get("contours_withheld") else self._labels(cine, seen),
            structures=[metric_name(s) for s in self.model.structures],
            spacing=(scale * seen.spacing[0], scale * seen.spacing[1]) if seen.spacing else None,
            ed=cine.get("ed_frame"),
            es=cine.get("es_frame"),
            ef=ef,
            ef_coverage=self.model.heads.get("ef", {}).get("coverage", 0.9),
            ef_withheld=cine.get("ef_withheld"),
            contours_withheld=cine.get("contours_withheld"),
            facts=_facts(cine),
            nearest=[_case(table[i], similar) for i, similar in cases],
        )

    def _labels(self, cine: dict[str, Any], seen: Seen) -> np.ndarray | None:
        """(T, SHOWN, SHOWN) labels, read from the file that :meth:`keep` wrote."""
        path = self.plan.out / "studies" / cine["study"] / f"{cine['id']}.nii.gz"
        if not path.exists():
            return None
        full = read_masks(path.parent, path.name, (seen.cine.shape[1], *seen.window[:2]))
        return resize_labels(window_masks(full, seen.window), SHOWN)


def _facts(cine: dict[str, Any]) -> dict[str, str]:
    """The facts that a page lists under a cine, name -> value with its unit."""
    facts = {"View": cine["view"] or "unknown", "Frames": str(cine["frames"])}
    if cine["fps"]:
        facts["Length"] = f"{cine['frames'] / cine['fps']:.1f} s"
    for name, key, unit in (
        ("EDV", "edv_ml", "mL"),
        ("ESV", "esv_ml", "mL"),
        ("EF from contours", "contour_ef", "%"),
    ):
        if cine.get(key) is not None:
            facts[name] = f"{cine[key]:.0f} {unit}"
    return facts


def _case(row: dict[str, Any], similarity: float) -> Nearest:
    from PIL import Image

    thumbnail = np.asarray(Image.open(io.BytesIO(row["thumbnail"])).convert("L"))
    note = f"EF {row['ef']:.0f} %" if row.get("ef") is not None else ""
    return Nearest(f"Cine {row['id']}", similarity, thumbnail, note)
