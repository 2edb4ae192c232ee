"""The console script ``discovr-monai``: arguments only, the work is imported when it is done."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="discovr-monai",
        description="Self-supervised learning from heart ultrasound. Training and evaluation are "
        "bundle configs: cd bundles/discovr && python -m monai.bundle run training "
        "--config_file configs/train.yaml",
    )
    commands = parser.add_subparsers(dest="command", required=True)
    phantom = commands.add_parser("phantom", help="make the beating-heart demo data")
    phantom.add_argument("folder", help="where to; made in EchoNet-Dynamic's layout")
    phantom.add_argument("--clips", type=int, default=300, help="how many (300)")
    phantom.add_argument("--frames", type=int, default=96, help="frames a clip (96)")
    phantom.add_argument("--seed", type=int, default=0, help="another seed, other hearts (0)")
    phantom.add_argument("--population", help="adult, paediatric or fetal only (a mixture)")
    phantom.add_argument("--gain", type=float, default=0.0, help="dB brighter (0)")
    phantom.add_argument("--depth", type=float, default=1.0, help="factor on the depth (1)")
    phantom.add_argument("--workers", type=int, help="processes (all cores)")
    scan = commands.add_parser("scan", help="check a folder of cines and report what is unusable")
    scan.add_argument("folder", help="a folder of AVI, MP4, DICOM, NIfTI or MHD files")
    scan.add_argument("--report", default=".", help="folder for bad_files.csv (here)")
    export = commands.add_parser("export", help="the video teacher of a training, for inference")
    export.add_argument("checkpoint", help="last.pt or best.pt of a training")
    export.add_argument("output", help="models/model.pt of the bundle, say")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command; 0 if it did its work, 1 with one line of explanation otherwise."""
    arguments = _parser().parse_args(argv)
    try:
        return _COMMANDS[arguments.command](arguments)
    except (ValueError, OSError) as error:
        print(f"Error: {error}", file=sys.stderr)
        return 1


def _phantom(arguments: argparse.Namespace) -> int:
    from discovr_monai.data.phantom import write_phantom_dataset

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


def _scan(arguments: argparse.Namespace) -> int:
    from pathlib import Path

    from discovr_monai.data.datalist import scan_folder, summary
    from discovr_monai.data.transforms import LoadCined

    loader = LoadCined(root=arguments.folder)
    found = scan_folder(
        Path(arguments.folder), loader=loader, output_dir=Path(arguments.report), val_fraction=0
    )
    print(summary(found.rows("training"), found.set_aside))
    return 0


def _export(arguments: argparse.Namespace) -> int:
    from discovr_monai.weights import export_teacher

    export_teacher(arguments.checkpoint, arguments.output)
    return 0


_COMMANDS = {"phantom": _phantom, "scan": _scan, "export": _export}

if __name__ == "__main__":
    sys.exit(main())
