"""Small phantom data sets in each public set's exact layout, with the quirks of the real ones.

For trying a pipeline before the data arrive, and for the tests of the adapters.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from discovr_monai.data.write.dicom import write_dicom
from discovr_monai.phantom.cine import PhantomCine, encode_avi, simulate_cine
from discovr_monai.phantom.dataset import csv_text
from discovr_monai.phantom.screen import simulate_screen

FRAMES, SIZE = 24, 112


@lru_cache(maxsize=64)
def _heart(seed: int, number: int, population: str = "adult") -> PhantomCine:
    kind = ("normal", "reduced_ef", "dilated")[number % 3]
    return simulate_cine(
        1000 * seed + number, num_frames=FRAMES, size=SIZE, population=population, kind=kind
    )


def _hearts(seed: int, count: int, population: str = "adult") -> list[PhantomCine]:
    return [_heart(seed, i, population) for i in range(count)]


def _csv(path: Path, header: str, rows: Sequence[Sequence[Any]], encoding: str = "utf-8") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(csv_text(header, rows).encode(encoding))


def _avi(path: Path, frames: np.ndarray, fps: float) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    encode_avi(frames, fps, path)


def _nifti(path: Path, frames: np.ndarray, spacing: float = 0.35, fps: float = 50.0) -> None:
    """(T, H, W) stored as (X, Y, T), with CAMUS's negative diagonal."""
    import nibabel

    image = nibabel.Nifti1Image(
        np.ascontiguousarray(frames.transpose(2, 1, 0)), np.diag([-spacing, -spacing, 1.0, 1.0])
    )
    image.header.set_zooms((spacing, spacing, 1 / fps))
    image.header.set_xyzt_units("mm", "sec")
    path.parent.mkdir(parents=True, exist_ok=True)
    nibabel.save(image, path)


def _mhd(path: Path, frames: np.ndarray, spacing: Sequence[float]) -> None:
    """MET_UCHAR .mhd beside its .raw; spacing (x, y[, t])."""
    sizes = " ".join(str(n) for n in frames.shape[::-1])
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(
        f"ObjectType = Image\nNDims = {frames.ndim}\nBinaryData = True\n"
        "BinaryDataByteOrderMSB = False\n"
        f"ElementSpacing = {' '.join(str(s) for s in spacing)}\nDimSize = {sizes}\n"
        f"ElementType = MET_UCHAR\nElementDataFile = {path.stem}.raw\n"
    )
    path.with_suffix(".raw").write_bytes(np.ascontiguousarray(frames).tobytes())


def _half_beat(heart: PhantomCine) -> tuple[slice, bool]:
    """From ED to ES or the other way round, whichever comes first; whether it starts at ED."""
    first, last = sorted((heart.ed_frame, heart.es_frame))
    return slice(first, last + 1), heart.ed_frame < heart.es_frame


# ---- one function per set ----------------------------------------------------------------


def echonet_dynamic(root: Path, patients: int, seed: int) -> None:
    """Mixed-case splits, a listed clip without a file, wrong sizes, a clip without tracings."""
    listing, tracings = [], []
    for i, heart in enumerate(_hearts(seed, patients)):
        name = f"0X{0x1A2B3C4D5E6F7000 + i:X}"
        split = ("TRAIN", "Train", "VAL", "TEST", "TRAIN", "test")[i % 6]
        size = (768, 1024) if i == 1 else (SIZE, SIZE)  # 6 rows of the real set claim this
        listing.append(
            (name, round(heart.ef, 6), round(heart.esv, 6), round(heart.edv, 6), *size,
             round(heart.fps), FRAMES, split)
        )  # fmt: skip
        _avi(root / "Videos" / f"{name}.avi", heart.frames, heart.fps)
        if i != 2:
            for frame, chords in (
                (heart.es_frame, heart.es_chords),
                (heart.ed_frame, heart.ed_chords),
            ):
                tracings += [(f"{name}.avi", *np.round(c, 4), frame) for c in chords]
    listing.append(("0XMISSING", 55.1, 40.0, 90.0, SIZE, SIZE, 50, FRAMES, "TRAIN"))
    header = "FileName,EF,ESV,EDV,FrameHeight,FrameWidth,FPS,NumberOfFrames,Split"
    _csv(root / "FileList.csv", header, listing)
    _csv(root / "VolumeTracings.csv", "FileName,X1,Y1,X2,Y2,Frame", tracings)


def echonet_pediatric(root: Path, patients: int, seed: int) -> None:
    """Polygons instead of chords, text for frame numbers, both views, folds 0 to 9."""
    hearts = _hearts(seed, patients, "paediatric")
    for view in ("A4C", "PSAX"):
        listing, tracings = [], []
        folder = root / "pediatric_echo_avi" / view
        for i, heart in enumerate(hearts):
            name = f"CR32a{7000 + i}-CR32a{9000 + i}-{i:06d}.avi"
            listing.append((name, round(heart.ef, 2), "F", 3 + i, 14.5, 96, i % 10))
            if i == 1 and view == "PSAX":
                continue  # listed, but not there
            _avi(folder / "Videos" / name, heart.frames, 50)
            for frame, chords in (
                (heart.es_frame, heart.es_chords),
                (heart.ed_frame, heart.ed_chords),
            ):
                outline = np.concatenate([chords[1:, :2], chords[:0:-1, 2:]])
                tracings += [(name, *np.round(p, 3), frame) for p in outline]
            if i == 0:
                tracings += [(name, 3.0, 4.0, "No Systolic"), (name, "", "", "")]
        _csv(folder / "FileList.csv", "FileName,EF,Sex,Age,Weight,Height,Split", listing)
        _csv(folder / "VolumeTracings.csv", "FileName,X,Y,Frame", tracings)


def echonet_lvh(root: Path, patients: int, seed: int) -> None:
    """Long table of callipers; the files' frame rate contradicts it; no suffix in names."""
    rows: list[tuple[Any, ...]] = []
    for i, heart in enumerate(_hearts(seed, patients)):
        name, spacing = f"0X{0xABCDEF000 + i:X}", 0.05  # cm per pixel
        frames = np.pad(heart.frames, ((0, 0), (4, 4), (24, 24)))  # native sizes, not square
        _avi(root / f"Batch{i % 4 + 1}" / f"{name}.avi", frames, 50)
        wall = 1.6 if i % 3 == 1 else 0.9
        for calc, value, frame in (
            ("IVSd", wall, heart.ed_frame), ("LVIDd", 4.6, heart.ed_frame),
            ("LVIDs", 3.1, heart.es_frame), ("LVPWd", wall, heart.ed_frame),
        ):  # fmt: skip
            length = value / spacing
            rows.append(
                (len(rows), name, calc, value, frame, 60, 60, 20, round(20 + length, 3), FRAMES,
                 19.97, frames.shape[2], frames.shape[1], ("train", "train", "val", "test")[i % 4])
            )  # fmt: skip
    rows.append((len(rows), "0XGONE", "IVSd", 1.0, 3, 1, 1, 1, 21, 60, 30.0, 800, 600, "train"))
    header = ",HashedFileName,Calc,CalcValue,Frame,X1,X2,Y1,Y2,Frames,FPS,Width,Height,split"
    _csv(root / "MeasurementsList.csv", header, rows)


def rvenet(root: Path, patients: int, seed: int) -> None:
    """Raw-screen DICOM and codebook.csv; two clips per patient; a row without a file."""
    rows: list[tuple[Any, ...]] = []
    for i in range(patients):
        for index in range(2):
            screen = simulate_screen(1000 * seed + 2 * i + index, num_frames=16)
            name = f"{i:04d}_{(i * 37) % 100:02d}_{index}"
            write_dicom(
                root / f"{name}.dcm", screen.frames, fps=screen.fps, region=screen.region,
                spacing=(screen.spacing, screen.spacing), tags={"PatientID": f"MRN{i}"},
            )  # fmt: skip
            split = "validation" if i % 4 == 3 else "train"
            rows.append((name, "A4C", 72, round(screen.fps), 38.0 + 5 * (i % 5), split))
    rows.append(("9999_00_0", "A4C", 70, 50, 51.0, "train"))
    _csv(root / "codebook.csv", "FileName,View,HR,FPS,RVEF,Split", rows)


def camus(root: Path, patients: int, seed: int) -> None:
    """NIfTI (X, Y, T) half sequences, ED and ES counted from 1 and in either order."""
    groups: dict[str, list[str]] = {"training": [], "validation": [], "testing": []}
    for i, heart in enumerate(_hearts(seed, patients)):
        patient = f"patient{i + 1:04d}"
        groups[("training", "training", "validation", "testing")[i % 4]].append(patient)
        folder = root / "database_nifti" / patient
        part, forward = _half_beat(heart)
        frames, masks = heart.frames[part], heart.masks[part]
        for view in ("2CH", "4CH"):
            if i == 1 and view == "4CH":  # the same beat, told backwards
                frames, masks, forward = frames[::-1], masks[::-1], not forward
            base = folder / f"{patient}_{view}"
            ends = {"ED": 0 if forward else -1, "ES": -1 if forward else 0}
            for phase, at in ends.items():
                _nifti(base.with_name(f"{base.name}_{phase}.nii.gz"), frames[[at]])
                _nifti(base.with_name(f"{base.name}_{phase}_gt.nii.gz"), masks[[at]])
            _nifti(base.with_name(f"{base.name}_half_sequence.nii.gz"), frames)
            _nifti(base.with_name(f"{base.name}_half_sequence_gt.nii.gz"), masks)
            count = len(frames)
            ed, es = (1, count) if forward else (count, 1)
            (folder / f"Info_{view}.cfg").write_text(
                f"ED: {ed}\nES: {es}\nNbFrame: {count}\nSex: F\nAge: {40 + i}\n"
                f"ImageQuality: Good\nEF: {round(heart.ef)}\nFrameRate: {heart.fps:.1f}\n"
            )
        (folder / "MANDATORY_CITATION.md").write_text("cite\n")
    (root / "database_nifti" / f"patient{patients + 1:04d}").mkdir()  # nothing in it
    (root / "database_split").mkdir()
    for name, members in groups.items():
        path = root / "database_split" / f"subgroup_{name}.txt"
        path.write_text("\n".join(members) + "\n")


def camus_mhd(root: Path, patients: int, seed: int) -> None:
    """The older release: anisotropic MHD, nine-line cfg, training and testing folders."""
    for i, heart in enumerate(_hearts(seed, patients)):
        patient = f"patient{i + 1:04d}"
        folder = root / ("testing" if i % 4 == 3 else "training") / patient
        part, forward = _half_beat(heart)
        frames, masks = heart.frames[part], heart.masks[part]
        base = folder / f"{patient}_4CH"
        _mhd(base.with_name(f"{base.name}_sequence.mhd"), frames, (0.308, 0.154, 1))
        ends = {"ED": 0 if forward else -1, "ES": -1 if forward else 0}
        for phase, at in ends.items():
            _mhd(base.with_name(f"{base.name}_{phase}.mhd"), frames[[at]], (0.308, 0.154, 1))
            _mhd(base.with_name(f"{base.name}_{phase}_gt.mhd"), masks[[at]], (0.308, 0.154, 1))
        count = len(frames)
        ed, es = (1, count) if forward else (count, 1)
        (folder / "Info_4CH.cfg").write_text(
            f"ED: {ed}\nES: {es}\nNbFrame: {count}\nSex: M\nAge: 61\nImageQuality: Medium\n"
            f"LVedv: {heart.edv:.1f}\nLVesv: {heart.esv:.1f}\nLVef: {heart.ef:.1f}\n"
        )


def ted(root: Path, patients: int, seed: int) -> None:
    """Full beats in MHD with every frame segmented."""
    for i, heart in enumerate(_hearts(seed, patients)):
        patient = f"patient{i + 1:03d}"
        base = root / "database" / patient / f"{patient}_4CH"
        _mhd(base.with_name(f"{base.name}_sequence.mhd"), heart.frames, (0.4, 0.4, 1))
        _mhd(base.with_name(f"{base.name}_sequence_gt.mhd"), heart.masks, (0.4, 0.4, 1))
        base.with_name(f"{base.name}_info.cfg").write_text(
            f"ED: {heart.ed_frame + 1}\nES: {heart.es_frame + 1}\nNbFrame: {FRAMES}\nSex: F\n"
            f"Age: 50\nImageQuality: Good\nEF: {heart.ef:.1f}\nFrameRate: {heart.fps:.1f}\n"
        )


def mimic_iv_echo(root: Path, patients: int, seed: int) -> None:
    """Raw-screen DICOM by patient and study, stills among them, and the labelled subset."""
    records, labelled = [], []
    for i in range(patients):
        subject, study = 10002221 + i, 94106955 + i
        folder = f"files/p{str(subject)[:2]}/p{subject}/s{study}"
        for number in range(2):
            name = f"{folder}/{study}_{number + 1:04d}.dcm"
            records.append((subject, study, "2180-01-01 10:00:00", name))
            path = root / "0.1" / name
            screen = simulate_screen(1000 * seed + 10 * i + number, num_frames=16)
            if number == 1 and i == 0:
                write_dicom(path, screen.frames[:1])  # a spectral still
            elif not (number == 1 and i == 1):
                write_dicom(path, screen.frames, fps=screen.fps, region=screen.region)
        if i % 4 != 3:
            heart = simulate_screen(1000 * seed + 10 * i, num_frames=16)
            lvvol = root / "lvvol-a4c" / "1.0.0"
            write_dicom(lvvol / "dicom" / f"{study}.dcm", heart.frames, fps=heart.fps)
            labelled.append((study, subject, 110.0, 48.0 + i, 56.0 - 5 * i, "GE", 50.0, 16))
    header = "subject_id,study_id,acquisition_datetime,dicom_filepath"
    _csv(root / "0.1" / "echo-record-list.csv", header, records)
    header = (
        "study_id,patient_id,LVEDV_A4C,LVESV_A4C,LVEF_A4C,manufacturer,frame_rate,number_of_frames"
    )
    _csv(root / "lvvol-a4c" / "1.0.0" / "FileList.csv", header, labelled)


def hmc_qu(root: Path, patients: int, seed: int) -> None:
    """Irregular names, an Excel table counting from 1, wall masks in MATLAB files."""
    import openpyxl
    from scipy.io import savemat

    book = openpyxl.Workbook()
    sheet = book.active
    assert sheet is not None
    segments = [f"SEG{n}" for n in (1, 2, 3, 5, 6, 7)]
    mask = "LV Wall Ground-truth Segmentation Masks"
    sheet.append(["ECHO", *segments, "Reference Frame", "End of Cycle", mask])
    for i, heart in enumerate(_hearts(seed, patients)):
        name = f"ES000{i:02d} N_4CH_{i % 2 + 1}" if i % 2 else f"ES000{i:02d}_CH2_1"
        values = ["MI" if i % 3 == 1 and s == "SEG3" else "non-MI" for s in segments]
        first, last = sorted((heart.ed_frame, heart.es_frame))
        sheet.append([name, *values, first + 1, last + 1, "ü" if i % 2 else None])
        _avi(root / "HMC-QU Echos" / f"{name}.avi", heart.frames, 25)
        if i % 2:
            path = root / "LV Ground-truth Segmentation Masks" / f"Mask_{name}.mat"
            path.parent.mkdir(parents=True, exist_ok=True)
            savemat(path, {"predicted": (heart.masks[first : last + 1] == 2).astype(np.uint8)})
    sheet.append(["ES00099 N_4CH_2", *["non-MI"] * 6, 1, 20, None])  # no such file
    root.mkdir(parents=True, exist_ok=True)
    book.save(root / "HMC_QU.xlsx")


def cardiac_uda(root: Path, patients: int, seed: int) -> None:
    """NIfTI by site, five labelled frames per clip, and a folder with all frames labelled."""
    base = root / "cardiacUDC_dataset"
    for i, heart in enumerate(_hearts(seed, patients)):
        site = ("Site_G_100", "Site_R_126", "label_all_frame")[i % 3]
        prefix = f"{'patient' if i % 2 else 'normal'}-{i}" if i % 3 == 2 else f"patient{i}"
        masks = heart.masks.copy()
        if site != "label_all_frame":
            masks[np.setdiff1d(np.arange(FRAMES), np.linspace(0, FRAMES - 1, 5).astype(int))] = 0
        _nifti(base / site / f"{prefix}-4_image.nii.gz", heart.frames, 1.0)
        if i != 0:
            _nifti(base / site / f"{prefix}-4_label.nii.gz", masks, 1.0)


def csv_list(root: Path, patients: int, seed: int) -> None:
    """``Path,class`` with text classes, one path outside, one missing file, one odd class."""
    rows: list[tuple[str, str]] = []
    for i, heart in enumerate(_hearts(seed, patients)):
        _avi(root / "clips" / f"c{i}.avi", heart.frames, heart.fps)
        rows.append((f"clips/c{i}.avi", "Normal" if heart.ef >= 50 else "Abnormal"))
    rows += [("../secret.avi", "Normal"), ("clips/gone.avi", "Normal"), ("clips/c0.avi", "Normal")]
    _avi(root / "clips" / "odd.avi", _heart(seed, 0).frames, 30)
    rows.append(("clips/odd.avi", "=1+1"))
    _csv(root / "train.csv", "Path,class", rows, encoding="utf-8-sig")


def folder(root: Path, patients: int, seed: int) -> None:
    """AVI, DICOM and NIfTI in a folder per patient; a folder named like a file; text files."""
    for i, heart in enumerate(_hearts(seed, patients)):
        place = root / f"case {i}"
        _avi(place / "cine.avi", heart.frames, heart.fps)
        screen = simulate_screen(1000 * seed + i, num_frames=16)
        write_dicom(
            place / f"IM{i:05d}", screen.frames, fps=screen.fps, tags={"PatientID": f"MRN{i}"}
        )
    _nifti(root / "0_image.nii" / "0.nii", _heart(seed, 0).frames)
    (root / "notes.txt").write_text("not a cine\n")


LAYOUTS: dict[str, Callable[[Path, int, int], None]] = {
    "echonet-dynamic": echonet_dynamic,
    "echonet-pediatric": echonet_pediatric,
    "echonet-lvh": echonet_lvh,
    "rvenet": rvenet,
    "camus": camus,
    "camus-mhd": camus_mhd,
    "mimic-iv-echo": mimic_iv_echo,
    "hmc-qu": hmc_qu,
    "cardiac-uda": cardiac_uda,
    "ted": ted,
    "csv-list": csv_list,
    "folder": folder,
}


def write_layout(name: str, root: str | Path, *, patients: int = 8, seed: int = 0) -> Path:
    """Writes a small phantom set in a public set's layout.

    Args:
        name: see ``LAYOUTS``.
        root: new or empty.
        patients: at least 4.
        seed: other hearts.

    Raises:
        ValueError: unknown layout, too few patients, or a folder with files in it.
    """
    root = Path(root)
    if name not in LAYOUTS:
        raise ValueError(f"layout {name!r} is unknown; there are {', '.join(LAYOUTS)}")
    if patients < 4:
        raise ValueError(f"{patients} patients: a layout needs at least 4")
    if root.exists() and any(root.iterdir()):
        raise ValueError(f"{root.name!r} holds files. Name a new or empty folder")
    root.mkdir(parents=True, exist_ok=True)
    LAYOUTS[name](root, patients, seed)
    return root
