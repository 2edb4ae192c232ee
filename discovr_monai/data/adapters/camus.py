"""CAMUS: 500 patients, two- and four-chamber half beats with every frame segmented."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from discovr_monai.base.tables import number
from discovr_monai.base.types import CineError, DatalistRow
from discovr_monai.data.adapters.layout import missing, percent, read_cfg, relative, split_name

TITLE = "CAMUS"
LICENCE = "CC BY-NC-SA 4.0"
SOURCE = "https://humanheart-project.creatis.insa-lyon.fr/database"
VIEWS = {"2CH": "A2C", "4CH": "A4C"}
SUBGROUPS = {
    "training": "subgroup_training.txt",
    "validation": "subgroup_validation.txt",
    "test": "subgroup_testing.txt",
}


def rows(
    root: Path, *, view: str | None = None, threshold: float = 50.0
) -> Iterator[DatalistRow | CineError]:
    """Rows of the half sequences, of the NIfTI release or of the older MHD one.

    ED and ES, counted from 1 in the files and in either order, become frames counted from 0; a
    half beat may run from systole to diastole.

    Args:
        root: the folder that holds database_nifti (or training and testing), or one above.
        view: "A2C" or "A4C" only; None for both.
        threshold: EF in percent below which a heart is labelled abnormal.

    Raises:
        ValueError, FileNotFoundError: for an unknown view or another folder.
    """
    wanted = {short: v for short, v in VIEWS.items() if view in (None, v, short)}
    if not wanted:
        raise ValueError(f"view {view!r} must be A2C or A4C")
    patients = sorted(p for p in root.rglob("patient[0-9]*") if p.is_dir())
    if not patients:
        raise FileNotFoundError(
            f"{root.name!r} does not look like CAMUS: there is no folder patient0001 in it. Give "
            "the folder that holds database_nifti"
        )
    splits = _official(root)
    for folder in patients:
        for short, name in wanted.items():
            yield _row(root, folder, short, name, splits, threshold)


def _official(root: Path) -> dict[str, str]:
    splits = {}
    for split, file in SUBGROUPS.items():
        for path in root.rglob(file):
            splits.update(dict.fromkeys(path.read_text().split(), split))
    return splits


def _row(
    root: Path, folder: Path, short: str, view: str, splits: dict[str, str], threshold: float
) -> DatalistRow | CineError:
    patient = folder.name
    new = folder / f"{patient}_{short}_half_sequence.nii.gz"
    old = folder / f"{patient}_{short}_sequence.mhd"
    cine = next((p for p in (new, new.with_suffix(""), old) if p.is_file()), None)
    cfg = folder / f"Info_{short}.cfg"
    name = relative(folder, root)
    if cine is None or not cfg.is_file():
        gone = "half sequence" if cine is None else f"Info_{short}.cfg"
        return missing(f"{name}/{short}", f"its {gone} is not there")
    about = dict(read_cfg(cfg))
    row: DatalistRow = {"image": relative(cine, root), "patient": patient, "view": view}
    if patient in splits:
        row["split"] = splits[patient]
    elif (part := split_name(folder.parent.name)) is not None:
        row["split"] = part
    ed, es = (number(about.get(k)) for k in ("ed", "es"))
    if ed is None or es is None or min(ed, es) < 1:
        return CineError(
            f"{name}/{cfg.name}", f"ED {about.get('ed')} and ES {about.get('es')} are no frames",
            "Copy the data set again",
        )  # fmt: skip
    row["ed_frame"], row["es_frame"] = int(ed) - 1, int(es) - 1
    ef = percent(number(about.get("ef") or about.get("lvef")))
    if ef is not None:
        row["ef"], row["label"] = ef, int(ef < threshold)
    for ours, theirs in (("edv", "lvedv"), ("esv", "lvesv")):
        if (volume := number(about.get(theirs))) is not None:
            row[ours] = volume  # type: ignore[literal-required]
    if fps := number(about.get("framerate")):
        row["fps"], row["fps_source"] = fps, cfg.name
    if about.get("imagequality"):
        row["quality"] = about["imagequality"].lower()
    _add_masks(row, root, cine)
    spacing = header_spacing(cine)
    if spacing is not None:
        row["spacing"] = spacing
    return row


def _add_masks(row: DatalistRow, root: Path, cine: Path) -> None:
    """The whole sequence's labels, else those of the ED and ES frames."""
    base = cine.name.split(".")[0]
    for suffix in (".nii.gz", ".nii", ".mhd"):
        whole = cine.with_name(f"{base}_gt{suffix}")
        if whole.is_file():
            row["mask"] = relative(whole, root)
            return
    short = "_".join(base.split("_")[:2])  # patient0001_4CH
    frames = {
        str(row[key]): relative(path, root)  # type: ignore[literal-required]
        for key, phase in (("ed_frame", "ED"), ("es_frame", "ES"))
        for suffix in (".nii.gz", ".mhd")
        if (path := cine.with_name(f"{short}_{phase}_gt{suffix}")).is_file()
    }
    if frames:
        row["mask"] = {"kind": "frames", "file": next(iter(frames.values())), "files": frames}


def header_spacing(path: Path) -> list[float] | None:
    """(row, column) mm from the header; None where it cannot be read (the reader will say so)."""
    try:
        if path.suffix == ".mhd":
            lines = path.read_text().splitlines()
            spacing = next(line for line in lines if line.startswith("ElementSpacing"))
            x, y = (float(v) for v in spacing.partition("=")[2].split()[:2])
        else:
            import nibabel

            x, y = (float(z) for z in nibabel.load(path).header.get_zooms()[:2])  # type: ignore[attr-defined]
    except Exception:  # a damaged header
        return None
    return [round(y, 6), round(x, 6)]
