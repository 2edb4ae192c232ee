"""Inference over a file, a folder or an archive, which any number of workers may share.

A run that was interrupted goes on where it stopped when it is started again.
"""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from monai.data import Dataset
from monai.inferers import Inferer
from tqdm import tqdm

from discovr_monai.base.engine import IsolatedPool
from discovr_monai.base.notice import NOTICE
from discovr_monai.base.tables import shown, write_table
from discovr_monai.inference.findings import Analyst, Finding
from discovr_monai.inference.model import EchoModel
from discovr_monai.inference.outputs import StudyWriter
from discovr_monai.inference.parquet import join_parquet, read_parquet, write_parquet
from discovr_monai.inference.plan import ArchivePart, Plan
from discovr_monai.inference.reading import CineReader, Seen

AT_ONCE = 8  # at most so many cines wait until their windows go through the encoder together


class ArchiveInference:
    """Computes embeddings, EF and contours of cines.

    The cines are cut into parts. The results do not depend on which worker does which part, nor
    on how often the run is interrupted.

    Args:
        model: the encoders and heads, with their weights.
        dataset: MONAI's data set, whose data are datalist rows; see :func:`find_cines`.
        reader: reads the cines of these rows.
        output_dir: the folder that :mod:`discovr_monai.inference.plan` describes.
        inferer: MONAI's inferer around the model; None calls the model directly.
        device: where the model computes.
        view: the view of cines whose datalist row names none; None means unknown.
        batch_size: windows that go through the encoders at once.
        part_size: cines in a part, which is the most that a killed worker loses.
        worker: this worker's number, from 0.
        workers_in_all: how many workers share the archive.
        readers: processes that read cines; 0 reads them in this process.
        contours: whether to segment every frame, if the model has a head for it.
        label_maps: whether to write the segmentations as NIfTI (and DICOM for DICOM sources).
        overlays: whether to write an animation of each segmented cine.
        pages: the largest number of studies that get a page.
        precision: "fp32" or "bf16", in which the encoders compute.

    Raises:
        ValueError: the worker's number or the precision is impossible, or the output folder
            cannot take these results (see :class:`Plan`).
    """

    def __init__(
        self,
        model: EchoModel,
        dataset: Dataset,
        reader: CineReader,
        output_dir: str | Path,
        *,
        inferer: Inferer | None = None,
        device: torch.device | str = "cpu",
        view: str | None = None,
        batch_size: int = 16,
        part_size: int = 64,
        worker: int = 0,
        workers_in_all: int = 1,
        readers: int = 0,
        contours: bool = True,
        label_maps: bool = True,
        overlays: bool = True,
        pages: int = 100,
        precision: str = "fp32",
    ) -> None:
        if not 0 <= worker < workers_in_all:
            raise ValueError(f"worker {worker} must lie in 0..{workers_in_all - 1}")
        if precision not in ("fp32", "bf16"):
            raise ValueError(f"precision {precision!r} must be fp32 or bf16")
        self.model = model.to(device)
        self.worker, self.workers_in_all, self.readers = worker, workers_in_all, readers
        self.contours = contours and "segmentation" in model.heads
        self.reader = reader
        about = {
            "notice": NOTICE,
            "model": model.sha256,
            "branch": model.branch,
            "pooling": model.pooling,
            "view": view,
            "sector": reader.loader.sector,
            "windows": {"least": reader.least, "overlap": reader.overlap},
            "contours": self.contours,
            "files": {"label_maps": label_maps, "overlays": overlays},
            "precision": precision,
        }
        root = reader.loader.root
        self.plan = Plan(Path(output_dir), root, dataset.data, about, part_size)
        self.analyst = Analyst(
            model,
            torch.device(device),
            batch_size=batch_size,
            view=view,
            contours=self.contours,
            bf16=precision == "bf16",
            inferer=inferer,
        )
        self.studies = StudyWriter(
            self.plan, self.reader, model, label_maps=label_maps, overlays=overlays, pages=pages
        )

    def run(self) -> Path:
        """Does this worker's parts; the worker that finishes last joins the results of all.

        Returns:
            The output folder.

        Raises:
            ValueError: no cine could be used.
        """
        mine = [p for p in self.plan.parts if p.number % self.workers_in_all == self.worker]
        total = sum(len(p.rows) for p in self.plan.parts)
        with (
            IsolatedPool(self.reader, workers=self.readers) as pool,
            tqdm(total=total, desc="cines", unit="cine", disable=self.worker > 0) as bar,
        ):
            finished = self.plan.finished()
            bar.update(sum(len(p.rows) for p in self.plan.parts if p.number in finished))
            for part in mine:
                if part.number in finished:
                    continue
                self._do_part(part, pool, bar)
                others = self.plan.finished() - finished - {part.number}
                bar.update(sum(len(self.plan.parts[n].rows) for n in others))
                finished |= {part.number, *others}
        if self.plan.finished() >= {p.number for p in self.plan.parts}:
            self._join_parts()
        return self.plan.out

    def _do_part(self, part: ArchivePart, pool: IsolatedPool, bar: Any) -> None:
        rows: list[dict[str, Any]] = []
        bad: list[tuple[str, str, str, str]] = []
        waiting: list[Seen] = []

        def flush() -> None:
            for seen, result in self._analyse(waiting):
                if isinstance(result, Finding):
                    self.studies.keep(result)
                    rows.append(self._row(result))
                else:
                    bad.append((seen.row["image"], *result))
            waiting.clear()

        for row, reading in self._read(part.rows, pool):
            bar.update()
            if "bad" in reading:
                bad.append((row["image"], *reading["bad"]))
                continue
            waiting.append(reading["seen"])
            windows = sum(len(s.clips) for s in waiting)
            if windows >= self.analyst.batch_size or len(waiting) >= AT_ONCE:
                flush()
        flush()
        order = {row["id"]: i for i, row in enumerate(part.rows)}
        rows.sort(key=lambda r: order[r["id"]])
        self.plan.write_aside(part, sorted(bad))
        write_parquet(self.plan.file(part), rows, self._columns())

    def _analyse(self, cines: list[Seen]) -> list[tuple[Seen, Finding | tuple[str, str, str]]]:
        """A finding of each cine, or why there is none: one failing cine must not stop others."""
        try:
            return list(zip(cines, self.analyst(cines) if cines else [], strict=True))
        except (RuntimeError, ValueError, MemoryError) as error:
            if len(cines) == 1:
                reason = f"the model failed on it ({type(error).__name__})"
                return [(cines[0], ("not analysed", reason, "Report it, leave it out"))]
            return [pair for seen in cines for pair in self._analyse([seen])]

    def _read(
        self, rows: Sequence[Any], pool: IsolatedPool
    ) -> Iterator[tuple[Any, dict[str, Any]]]:
        if not self.readers:
            for row in rows:
                yield row, self.reader(row)
            return
        for row, reading, failure in pool.run(rows):
            yield row, reading if failure is None else {"bad": failure}

    def _row(self, finding: Finding) -> dict[str, Any]:
        from PIL import Image

        picture = io.BytesIO()
        Image.fromarray(finding.seen.thumbnail).save(picture, "JPEG", quality=80)
        return {
            **finding.values,
            "thumbnail": picture.getvalue(),
            "embedding": finding.embedding,
            "model": self.model.sha256,
            "notice": NOTICE,
        }

    def _columns(self) -> Any:
        """The schema of the table, which is the same for every part."""
        import pyarrow as pa

        text, number, whole = pa.string(), pa.float64(), pa.int32()
        columns = {"id": text, "patient": text, "study": text, "view": text, "frames": whole}
        columns |= {"fps": number, "windows": whole}
        if "ef" in self.model.heads:
            columns |= {"ef": number, "ef_low": number, "ef_high": number}
            columns |= {"ef_withheld": text, "ef_unfamiliarity": number}
        if self.contours:
            columns |= {"contours_withheld": text, "contours_unfamiliarity": number}
            columns |= {"edv_ml": number, "esv_ml": number, "contour_ef": number}
            columns |= {"ed_frame": whole, "es_frame": whole, "dicom": text}
        columns |= {"thumbnail": pa.binary(), "embedding": pa.list_(pa.float32())}
        columns |= {"model": text, "notice": text}
        return pa.schema(columns.items())

    def _join_parts(self) -> None:
        """Writes one table of all parts, what was set aside, and the studies' pages."""
        out, private = self.plan.out, self.plan.private
        bad = self.plan.read_aside()
        write_table(private / "bad_files.csv", ("file", "kind", "reason", "what to do"), bad)
        files = [self.plan.file(p) for p in self.plan.parts]
        count = join_parquet(out / "embeddings.parquet", files)
        names = ((self.plan.id_of(n), n) for part in self.plan.names for n in part)
        write_table(private / "files.csv", ("id", "file"), names)
        large = ("embedding", "thumbnail")
        columns = [c for c in self._columns().names if c not in large]
        rows = (tuple(r.values()) for f in files for r in read_parquet(f, leave_out=large))
        write_table(out / "results.csv", columns, rows)
        if not count:
            first = f"; the first: {shown(bad[0][0])}: {bad[0][2]}" if bad else ""
            raise ValueError(
                f"no usable cine: all {len(bad)} files were set aside, the reasons are in "
                f"{private.name}/bad_files.csv{first}"
            )
        pages = self.studies.finish()
        print(f"{count} cines, {len(bad)} files set aside. {NOTICE}")
        print(f"Written: {out.name}/embeddings.parquet, results.csv", end="")
        print(f", and {pages} pages to open: studies/STUDY/page.html" if pages else "")
        print(f"Not for sharing: {private.name} (which file is which, what was set aside)")
