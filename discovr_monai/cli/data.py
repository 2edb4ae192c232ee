"""Commands that make and check data."""

from __future__ import annotations

import argparse
from pathlib import Path

from discovr_monai.cli.types import Commands


def add(commands: Commands) -> None:
    """Adds these commands to the parser, in the order in which --help lists them."""
    _add_phantom(commands)
    _add_datalist(commands)
    _add_prepare(commands)
    _add_reidentify(commands)
    _add_shards(commands)
    _add_scan(commands)


def _add_phantom(commands: Commands) -> None:
    parser = commands.add_parser("phantom", help="make the beating-heart demo data")
    parser.add_argument("folder", help="where to; made in EchoNet-Dynamic's layout")
    parser.add_argument("--clips", type=int, default=300, help="how many (300)")
    parser.add_argument("--frames", type=int, default=96, help="frames a clip (96)")
    parser.add_argument("--seed", type=int, default=0, help="another seed, other hearts (0)")
    parser.add_argument("--population", help="adult, paediatric or fetal only (a mixture)")
    parser.add_argument("--gain", type=float, default=0.0, help="dB brighter (0)")
    parser.add_argument("--depth", type=float, default=1.0, help="factor on the depth (1)")
    parser.add_argument("--workers", type=int, help="processes (all cores)")
    parser.add_argument("--layout", help="a few clips in another public set's layout instead")
    parser.set_defaults(run=_phantom)


def _phantom(arguments: argparse.Namespace) -> int:
    from discovr_monai.phantom.dataset import write_phantom_dataset

    if arguments.layout is not None:
        from discovr_monai.phantom.layouts import write_layout

        write_layout(arguments.layout, arguments.folder, seed=arguments.seed)
        return 0
    write_phantom_dataset(
        arguments.folder,
        num_clips=arguments.clips,
        num_frames=arguments.frames,
        seed=arguments.seed,
        workers=arguments.workers,
        population=arguments.population,
        gain=arguments.gain,
        depth=arguments.depth,
    )
    return 0


def _add_datalist(commands: Commands) -> None:
    parser = commands.add_parser(
        "datalist", help="a public set's folder, a CSV or any folder to a datalist"
    )
    parser.add_argument("name", help="echonet-dynamic, camus, ...; 'list' shows them all")
    parser.add_argument("root", nargs="?", help="the data set's folder")
    parser.add_argument("-o", "--output", help="the JSON to write (ROOT/datalist.json)")
    parser.add_argument("--report", metavar="DIR", help="draw contact sheet and histograms")
    parser.add_argument("--no-check", action="store_true", help="do not decode every file once")
    parser.add_argument("--threshold", type=float, help="EF (%%) or wall (mm) that is abnormal")
    parser.add_argument("--view", help="A4C, A2C, PSAX only")
    parser.add_argument("--site", help="G or R only (cardiac-uda)")
    parser.add_argument("--table", help="which CSV (csv-list)")
    parser.add_argument("--patient-from", choices=("file", "folder"), help="(folder)")
    parser.add_argument("--folds", type=int, help="cross-validation folds to make by patient")
    parser.add_argument("--test-fold", type=int, help="which fold is the test section (0)")
    parser.add_argument("--val-fold", type=int, help="which is validation (the next one)")
    parser.add_argument("--val-fraction", type=float, help="of the patients (0.1)")
    parser.add_argument("--test-fraction", type=float, help="of the patients (0.1)")
    parser.add_argument("--seed", type=int, help="of the split by patient (0)")
    parser.add_argument("--workers", type=int, help="processes of the check (all cores)")
    parser.set_defaults(run=_datalist)


def _datalist(arguments: argparse.Namespace) -> int:
    from discovr_monai.data.lists import catalogue

    if arguments.name == "list":
        for name in catalogue.names():
            module = catalogue.adapter(name)
            print(f"{name:18} {module.TITLE}. Licence: {module.LICENCE}. From: {module.SOURCE}")
        return 0
    if arguments.root is None:
        raise ValueError("give the data set's folder: discovr-monai datalist NAME ROOT")
    keys = (
        "threshold", "view", "site", "table", "patient_from", "folds", "test_fold", "val_fold",
        "val_fraction", "test_fraction", "seed", "workers",
    )  # fmt: skip
    options = {k: v for k in keys if (v := getattr(arguments, k)) is not None}
    check = not arguments.no_check
    if arguments.report and not check:
        raise ValueError("--report needs the check: leave out --no-check")
    found = catalogue.build_datalist(
        arguments.name, arguments.root, check=check, progress=True, **options
    )
    output = Path(arguments.output or Path(arguments.root) / "datalist.json")
    report = found.write(output)
    print(found.describe())
    print(f"Licence: {found.licence}")
    if report is not None:
        print(f"{len(found.set_aside)} files set aside, reasons in {report.name}")
    if arguments.report:
        from discovr_monai.data.lists.report import draw_report

        files = draw_report(found, arguments.report)
        print("Drawn: " + ", ".join(f.name for f in files))
    print(
        f"Written: {output.name}. Train: cd bundles/discovr && python -m monai.bundle run training "
        f"--config_file configs/train.yaml --dataset_dir ROOT --datalist {output.name}"
    )
    return 0


def _add_prepare(commands: Commands) -> None:
    parser = commands.add_parser(
        "prepare", help="an archive of DICOM, AVI, MP4 to compact de-identified cines"
    )
    parser.add_argument("source", help="the archive, read only")
    parser.add_argument("out", help="new folder; holds nothing that leads back to a patient")
    parser.add_argument("--private", help="journal and encrypted manifest (OUT-private)")
    parser.add_argument("--salt", metavar="FILE", help="the salt's file (your own)")
    parser.add_argument("--size", type=int, default=112, help="pixels per side (112)")
    parser.add_argument("--dicom", action="store_true", help="de-identified DICOM as well")
    parser.add_argument("--patient-from", choices=("file", "folder"), default="file")
    parser.add_argument("--workers", type=int, help="processes (all cores)")
    parser.set_defaults(run=_prepare)


def _prepare(arguments: argparse.Namespace) -> int:
    from discovr_monai.data.archive.prepare import prepare

    counts = prepare(
        arguments.source,
        arguments.out,
        private=arguments.private,
        size=arguments.size,
        dicom=arguments.dicom,
        patient_from=arguments.patient_from,
        salt_file=arguments.salt,
        workers=arguments.workers,
    )
    kept = counts.pop("kept")
    print(f"{kept} cines kept, {counts.total()} files set aside")
    for reason, number in counts.most_common(8):
        print(f"  {number:6} {reason}")
    print(
        "The output may be shared, OUT-private and the salt may not. Train: cd bundles/discovr && "
        "python -m monai.bundle run training --config_file configs/train.yaml --dataset_dir OUT"
    )
    return 0


def _add_reidentify(commands: Commands) -> None:
    parser = commands.add_parser("reidentify", help="which files prepared ids came from")
    parser.add_argument("private", help="the private folder of a prepared archive")
    parser.add_argument("ids", nargs="*", help="only these ids")
    parser.add_argument("--salt", metavar="FILE", help="the salt's file (your own)")
    parser.set_defaults(run=_reidentify)


def _reidentify(arguments: argparse.Namespace) -> int:
    from discovr_monai.base.tables import shown
    from discovr_monai.data.archive.prepare import reidentify

    for entry in reidentify(arguments.private, arguments.salt):
        if not arguments.ids or {entry["id"], entry["patient"]} & set(arguments.ids):
            print(entry["id"], entry["patient"], entry["patient_id"], shown(entry["source"]))
    return 0


def _add_shards(commands: Commands) -> None:
    parser = commands.add_parser("shards", help="pack prepared cines into large files")
    parser.add_argument("prepared", help="the output of prepare")
    parser.add_argument("out", help="new folder")
    parser.add_argument("--gb", type=float, default=1.0, help="10^9 bytes of a shard (1)")
    parser.add_argument("--seed", type=int, default=0, help="of the order of the cines (0)")
    parser.set_defaults(run=_shards)


def _shards(arguments: argparse.Namespace) -> int:
    from discovr_monai.data.archive.shards import pack

    count = pack(arguments.prepared, arguments.out, gb=arguments.gb, seed=arguments.seed)
    print(f"{count} shards. Train with --dataset_dir OUT --shard_window 4")
    return 0


def _add_scan(commands: Commands) -> None:
    parser = commands.add_parser("scan", help="check a folder of cines and report what is unusable")
    parser.add_argument("folder", help="a folder of AVI, MP4, DICOM, NIfTI or MHD files")
    parser.add_argument("--report", default=".", help="folder for bad_files.csv (here)")
    parser.set_defaults(run=_scan)


def _scan(arguments: argparse.Namespace) -> int:
    from discovr_monai.data.lists.datalist import summary
    from discovr_monai.data.lists.scan import scan_folder
    from discovr_monai.data.read.loader import CineLoader

    loader = CineLoader(arguments.folder)
    found = scan_folder(
        Path(arguments.folder), loader=loader, output_dir=Path(arguments.report), val_fraction=0
    )
    print(summary(found.rows("training"), found.set_aside))
    return 0
