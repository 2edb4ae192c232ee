"""Frozen features of a datalist's cines, computed once and kept in a file.

A file that was made from other cines, another checkpoint or with other settings is never used.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast
from zipfile import BadZipFile

import numpy as np
import torch
from monai.transforms import Compose
from tqdm import tqdm

from discovr_monai.base.files import save_atomic
from discovr_monai.base.types import DatalistRow
from discovr_monai.data.clips.dataset import ClipDataset
from discovr_monai.data.clips.transforms import LoadCined, SampleClipd
from discovr_monai.data.lists.datalist import Datalist
from discovr_monai.evaluation.features.encoders import EvaluatedEncoder

POOLINGS = ("cls", "mean", "both", "motion")
COMPONENTS = 128  # principal components of the pixels, at most


@dataclass
class Section:
    """The features of one section of a datalist.

    Attributes:
        rows: of the datalist, in the arrays' order.
        cls, mean, motion: (M, D) float32, averaged over each cine's clips; see
            :func:`discovr_monai.evaluation.features.encoders.pool_tokens`.
        tokens: (M, N, d) float16 of the whole cine's clips, averaged, or None.
    """

    rows: list[DatalistRow]
    cls: np.ndarray
    mean: np.ndarray
    motion: np.ndarray
    tokens: np.ndarray | None = None

    def pooled(self, pooling: str) -> np.ndarray:
        """(M, D) features: "cls", "mean", "both" (these side by side) or "motion".

        Raises:
            ValueError: for another word, and for "motion" where nothing changes over time.
        """
        if pooling not in POOLINGS:
            raise ValueError(f"pooling {pooling!r} must be one of {', '.join(POOLINGS)}")
        if pooling == "motion" and not np.ptp(self.motion) > 1e-9:
            raise ValueError(
                "pooling 'motion' finds no change over time (clips of one token in time?): use mean"
            )
        if pooling == "both":
            return np.concatenate((self.cls, self.mean), axis=1)
        return {"cls": self.cls, "mean": self.mean, "motion": self.motion}[pooling]


def patients_of(rows: Sequence[DatalistRow]) -> list[str]:
    """Whose cine each row is. A cine of an unknown patient counts as a patient of its own.

    >>> patients_of([{"image": "a.avi", "patient": "p1"}, {"image": "b.avi"}])
    ['p1', 'cine b.avi']
    """
    return [str(r.get("patient") or f"cine {r['image']}") for r in rows]


def check_splits(sections: Mapping[str, Sequence[DatalistRow]]) -> None:
    """Refuses sections that share a patient or a cine.

    Raises:
        ValueError: with the sections and how many patients they share.
    """
    seen: dict[str, tuple[set[str], set[str]]] = {}
    for name, rows in sections.items():
        patients, cines = set(patients_of(rows)), {r["image"] for r in rows}
        for other, (other_patients, other_cines) in seen.items():
            shared = len(patients & other_patients) or len(cines & other_cines)
            if shared:
                raise ValueError(
                    f"{shared} patients of section {name!r} are also in {other!r}: a result would "
                    "be worth nothing. Split the datalist by patient"
                )
        seen[name] = (patients, cines)


def data_fingerprint(root: Path, rows: Sequence[DatalistRow]) -> str:
    """16 digits that change with the cines' order, names, sizes and given frame rates."""
    digest = hashlib.sha256()
    for row in rows:
        path = root / row["image"]
        size = path.stat().st_size if path.is_file() else 0
        digest.update(f"{row['image']}|{size}|{row.get('fps')}\n".encode())
    return digest.hexdigest()[:16]


class Features:
    """Features of the sections of a datalist by one encoder.

    Args:
        encoder: sees the cines; clips are sampled and normalised as in its training.
        data: the datalist.
        loader: reads the cines.
        sections: names such as training, validation, test; no patient may be in two.
        file: npz that is reused, or written where it is missing.
        clips_per_cine: how many evenly spaced clips' features are averaged.
        tokens: whether to keep all tokens too (for attentive probes); they need N times the room.
        stride, duration: other than the training's, if not None.
        batch_size: clips at once.
        workers: processes that read cines.

    Raises:
        ValueError: if the file comes from another checkpoint, other cines or settings.
    """

    def __init__(
        self,
        encoder: EvaluatedEncoder,
        data: Datalist,
        loader: LoadCined,
        sections: Sequence[str],
        file: str | Path,
        *,
        clips_per_cine: int = 3,
        tokens: bool = False,
        stride: int | None = None,
        duration: float | None = None,
        batch_size: int = 16,
        workers: int = 0,
    ) -> None:
        self.encoder, self.loader, self.file = encoder, loader, Path(file)
        self.rows = {name: data.rows(name) for name in dict.fromkeys(sections)}
        check_splits(self.rows)
        self.own_sampling = stride is None and duration is None  # as in the training
        if self.own_sampling:
            stride, duration = encoder.clip["stride"], encoder.clip["duration"]
        self.sampling: dict[str, Any] = {"stride": stride, "duration": duration}
        self.clips_per_cine, self.keep_tokens = clips_per_cine, tokens
        self.batch_size, self.workers = batch_size, workers
        self.about = {
            "checkpoint": encoder.sha256,
            "branch": encoder.branch,
            "clips_per_cine": clips_per_cine,
            "tokens": tokens,
            "sector_mask": loader.sector,
            **self.sampling,
        }
        self.cines = {n: data_fingerprint(loader.root, rows) for n, rows in self.rows.items()}
        self._loaded: dict[str, Section] | None = None

    def load(self) -> dict[str, Section]:
        """All sections, read from the file or computed and written to it."""
        if self._loaded is None:
            arrays = self._read() if self.file.exists() else {}
            missing = [name for name in self.rows if f"{name}/motion" not in arrays]
            if missing:
                arrays = self._compute(arrays, missing)
            self._loaded = {
                name: Section(
                    rows,
                    arrays[f"{name}/cls"],
                    arrays[f"{name}/mean"],
                    arrays[f"{name}/motion"],
                    arrays.get(f"{name}/tokens"),
                )
                for name, rows in self.rows.items()
            }
        return self._loaded

    def __getitem__(self, section: str) -> Section:
        return self.load()[section]

    def clips(self, num_clips: int | None = None, random: bool = False) -> Compose:
        """A transform from a row to its clips under "image".

        Args:
            num_clips: n, clips_per_cine if None.
            random: whether they begin at random frames or are evenly spaced.

        Returns:
            Row -> (C, T, H, W), or (n, C, T, H, W) for n > 1.
        """
        clip = self.encoder.clip
        sample = SampleClipd(
            num_frames=self.encoder.num_frames,
            num_clips=self.clips_per_cine if num_clips is None else num_clips,
            random=random,
            pad_mode=clip["pad_mode"],
            default_fps=clip["default_fps"],
            **self.sampling,
        )
        return Compose([self.loader, sample])

    def thumbnail(self, row: DatalistRow) -> np.ndarray:
        """(s, s) uint8, a cine's middle frame as the network sees it."""
        image = self.loader(cast(dict, row))["image"]  # (C, T, s, s)
        return np.array(image[0, image.shape[1] // 2])

    def _compute(self, arrays: dict[str, Any], missing: Sequence[str]) -> dict[str, Any]:
        """Adds the missing sections to the arrays and writes the file."""
        if self.encoder.branch == "pixel_pca":  # its components are those of the first section
            arrays, missing = {}, list(self.rows)
        computed = {name: self._section(name, self.rows[name]) for name in missing}
        if self.encoder.branch == "pixel_pca":
            _reduce(computed)
        cines = {**json.loads(str(arrays.get("cines", "{}"))), **self.cines}
        arrays = {
            **arrays,
            "about": np.array(json.dumps(self.about, sort_keys=True)),
            "cines": np.array(json.dumps(cines, sort_keys=True)),
        }
        for name, features in computed.items():
            arrays[f"{name}/id"] = np.array([r["id"] for r in self.rows[name]])
            arrays |= {f"{name}/{key}": value for key, value in features.items()}

        def write(temporary: Path) -> None:
            with temporary.open("wb") as file:
                np.savez(file, **arrays)

        save_atomic(write, self.file)
        return arrays

    @torch.no_grad()
    def _section(self, name: str, rows: Sequence[DatalistRow]) -> dict[str, np.ndarray]:
        dataset = ClipDataset(rows, self.clips())
        per_batch = max(1, self.batch_size // self.clips_per_cine)
        batches = torch.utils.data.DataLoader(dataset, per_batch, num_workers=self.workers)
        parts: dict[str, list[np.ndarray]] = {"cls": [], "mean": [], "motion": []}
        for batch in tqdm(batches, desc=f"features of {name}", unit="batch"):
            image = torch.as_tensor(batch["image"])
            clips = image.flatten(0, 1) if self.clips_per_cine > 1 else image
            ready = self.encoder.prepare({"image": clips}, self.encoder.device)
            for key, value in self.encoder.module.embed(ready).items():
                parts[key].append(self._per_cine(value.float()))
            if self.keep_tokens:
                tokens = self.encoder.module.tokens(ready).flatten(1, 3).float()  # (B, N, d)
                parts.setdefault("tokens", []).append(self._per_cine(tokens).astype(np.float16))
        return {key: np.concatenate(values) for key, values in parts.items()}

    def _per_cine(self, values: torch.Tensor) -> np.ndarray:
        """(B n, ...) -> (B, ...), the mean over each cine's n clips."""
        return values.unflatten(0, (-1, self.clips_per_cine)).mean(1).cpu().numpy()

    def _read(self) -> dict[str, Any]:
        """The file's arrays.

        Raises:
            ValueError: if they are not what would be computed.
        """
        remedy = "remove it, or name another with --features_file"
        try:
            with np.load(self.file, allow_pickle=False) as content:
                arrays = {key: content[key] for key in content.files}
            about, cines = json.loads(str(arrays["about"])), json.loads(str(arrays["cines"]))
        except (ValueError, KeyError, OSError, EOFError, BadZipFile) as error:
            raise ValueError(
                f"{self.file.name} is not a features file, or damaged: {remedy}"
            ) from error
        for key, value in self.about.items():
            if about.get(key) != value:
                why = f"with {key} {about.get(key)}, not {value}"
                why = "by another checkpoint" if key == "checkpoint" else why
                raise ValueError(f"{self.file.name} was made {why}: {remedy}")
        for name, value in self.cines.items():
            if cines.get(name, value) != value:
                raise ValueError(
                    f"{self.file.name} was made from other cines of section {name!r}: {remedy}"
                )
        return arrays


def _reduce(sections: dict[str, dict[str, np.ndarray]]) -> None:
    """Replaces pixels by their principal components in the first section."""
    from sklearn.decomposition import PCA

    first = next(iter(sections.values()))["cls"]
    pca = PCA(min(COMPONENTS, *first.shape), svd_solver="full").fit(first)
    for features in sections.values():
        components = pca.transform(features["cls"]).astype(np.float32)
        features |= dict.fromkeys(("cls", "mean", "motion"), components)


def subset_by_patient(
    rows: Sequence[DatalistRow], fraction: float, seed: int, classes: np.ndarray | None = None
) -> np.ndarray:
    """Indices of the rows of about ``fraction`` of the patients, for few-label curves.

    A smaller fraction is a part of a larger one. With classes, the fraction is taken of the
    patients of each class, and at least one patient of every class.

    Args:
        fraction: in (0, 1].
        seed: of the patients' order.
        classes: (M,) int or None.

    Raises:
        ValueError: if the fraction is out of range.
    """
    if not 0 < fraction <= 1:
        raise ValueError(f"label fraction {fraction} must lie in (0, 1]")
    if fraction == 1:
        return np.arange(len(rows))
    owners = np.array(patients_of(rows))
    order = np.random.default_rng(seed).permutation(np.unique(owners))
    group = dict.fromkeys(order, 0)
    if classes is not None:
        group = {p: int(classes[owners == p][0]) for p in order}
    chosen: set[str] = set()
    for value in sorted(set(group.values())):
        members = [p for p in order if group[p] == value]
        least = 1 if classes is not None else 2
        chosen |= set(members[: max(least, round(fraction * len(members)))])
    if classes is not None:  # a class may occur on some patients' later rows only
        for value in np.unique(classes):
            chosen.add(next(p for p in order if p in owners[classes == value]))
    return np.flatnonzero(np.isin(owners, list(chosen)))
