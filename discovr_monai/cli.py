"""The console script ``discovr-monai``: arguments only, the work is imported when it is done."""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path


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
    phantom.add_argument("--layout", help="a few clips in another public set's layout instead")
    datalist = commands.add_parser(
        "datalist", help="a public set's folder, a CSV or any folder to a datalist"
    )
    datalist.add_argument("name", help="echonet-dynamic, camus, ...; 'list' shows them all")
    datalist.add_argument("root", nargs="?", help="the data set's folder")
    datalist.add_argument("-o", "--output", help="the JSON to write (ROOT/datalist.json)")
    datalist.add_argument("--report", metavar="DIR", help="draw contact sheet and histograms")
    datalist.add_argument("--no-check", action="store_true", help="do not decode every file once")
    datalist.add_argument("--threshold", type=float, help="EF (%%) or wall (mm) that is abnormal")
    datalist.add_argument("--view", help="A4C, A2C, PSAX only")
    datalist.add_argument("--site", help="G or R only (cardiac-uda)")
    datalist.add_argument("--table", help="which CSV (csv-list)")
    datalist.add_argument("--patient-from", choices=("file", "folder"), help="(folder)")
    datalist.add_argument("--folds", type=int, help="cross-validation folds to make by patient")
    datalist.add_argument("--test-fold", type=int, help="which fold is the test section (0)")
    datalist.add_argument("--val-fold", type=int, help="which is validation (the next one)")
    datalist.add_argument("--val-fraction", type=float, help="of the patients (0.1)")
    datalist.add_argument("--test-fraction", type=float, help="of the patients (0.1)")
    datalist.add_argument("--seed", type=int, help="of the split by patient (0)")
    datalist.add_argument("--workers", type=int, help="processes of the check (all cores)")
    prepare = commands.add_parser(
        "prepare", help="an archive of DICOM, AVI, MP4 to compact de-identified cines"
    )
    prepare.add_argument("source", help="the archive, read only")
    prepare.add_argument("out", help="new folder; holds nothing that leads back to a patient")
    prepare.add_argument("--private", help="journal and encrypted manifest (OUT-private)")
    prepare.add_argument("--salt", metavar="FILE", help="the salt's file (your own)")
    prepare.add_argument("--size", type=int, default=112, help="pixels per side (112)")
    prepare.add_argument("--dicom", action="store_true", help="de-identified DICOM as well")
    prepare.add_argument("--patient-from", choices=("file", "folder"), default="file")
    prepare.add_argument("--workers", type=int, help="processes (all cores)")
    whose = commands.add_parser("reidentify", help="which files prepared ids came from")
    whose.add_argument("private", help="the private folder of a prepared archive")
    whose.add_argument("ids", nargs="*", help="only these ids")
    whose.add_argument("--salt", metavar="FILE", help="the salt's file (your own)")
    shards = commands.add_parser("shards", help="pack prepared cines into large files")
    shards.add_argument("prepared", help="the output of prepare")
    shards.add_argument("out", help="new folder")
    shards.add_argument("--gb", type=float, default=1.0, help="10^9 bytes of a shard (1)")
    shards.add_argument("--seed", type=int, default=0, help="of the order of the cines (0)")
    scan = commands.add_parser("scan", help="check a folder of cines and report what is unusable")
    scan.add_argument("folder", help="a folder of AVI, MP4, DICOM, NIfTI or MHD files")
    scan.add_argument("--report", default=".", help="folder for bad_files.csv (here)")
    model = commands.add_parser("model", help="teachers and heads in one file, for inference")
    model.add_argument("checkpoint", help="last.pt or best.pt of a training, or a converted file")
    model.add_argument("output", help="models/model.pt of the bundle, say")
    model.add_argument(
        "--head", action="append", default=[], help="of --save_head in an evaluation; repeatable"
    )
    export = commands.add_parser("export", help="a model's networks for other runtimes, checked")
    export.add_argument("model", help="models/model.pt of the bundle, or any checkpoint of ours")
    export.add_argument("folder", help="where to: PART.onnx, PART.pt2, PART.ts, PART.int8.onnx")
    export.add_argument(
        "--format", nargs="+", default=["onnx", "program"], metavar="FORMAT",
        help="onnx, program (torch.export), torchscript, int8 (onnx program)",
    )  # fmt: skip
    export.add_argument(
        "--part", nargs="+", metavar="PART", help="embedding, ef, segmentation (all there are)"
    )
    export.add_argument("--branch", default="video_teacher", help="of the embedding")
    export.add_argument(
        "--pooling", default="cls", help="of the embedding: cls, mean, both, motion"
    )
    convert = commands.add_parser(
        "convert", help="released weights (DISCOVR, VideoMAE, SIGMA, DINO, MAE) to ours, and back"
    )
    convert.add_argument("source", metavar="IN", help=".pth, .pt, .bin, .safetensors or .npz")
    convert.add_argument("output", metavar="OUT", help=".safetensors")
    convert.add_argument("--layout", default="auto", help="discovr, videomae or vit (auto)")
    convert.add_argument("--image-size", type=int, help="pixels, other than the file's")
    convert.add_argument("--num-frames", type=int, help="frames of a clip, other than the file's")
    convert.add_argument("--num-heads", type=int, help="of the encoders (usual for the width)")
    convert.add_argument("--decoder-num-heads", type=int, help="(usual for the width)")
    convert.add_argument("--stride", type=int, help="frames between samples (the layout's)")
    convert.add_argument("--mean", type=float, nargs=3, help="of intensities 0..1 (ImageNet's)")
    convert.add_argument("--std", type=float, nargs=3, help="(ImageNet's)")
    convert.add_argument("--licence", help="of the weights (what download wrote beside IN)")
    convert.add_argument(
        "--to-released", action="store_true", help="a file of ours to the released layout"
    )
    fetch = commands.add_parser("download", help="a released file, with its licence and hash")
    fetch.add_argument("name", help="discovr-800, videomae-base, ...; 'list' shows them all")
    fetch.add_argument("--to", metavar="DIR", help="folder (a cache in your home)")
    fetch.add_argument("--sha256", help="the hash that it must have")
    fetch.add_argument(
        "--accept-unverified", action="store_true", help="take it although nobody tells its hash"
    )
    nearest = commands.add_parser("nearest", help="the cines that are most like one of them")
    nearest.add_argument("embeddings", help="embeddings.parquet of an inference")
    nearest.add_argument("id", help="of a cine in it")
    nearest.add_argument("--k", type=int, default=10, help="how many (10)")
    label = commands.add_parser("label", help="a MONAI Label server over an archive (make label)")
    label.add_argument("--studies", required=True, metavar="DIR", help="the archive, read only")
    label.add_argument("--work", metavar="DIR", help="cines presented and labels (STUDIES-label)")
    label.add_argument("--model", metavar="FILE", help="with heads (the bundle's models/model.pt)")
    label.add_argument("--view", help="A4C, ...: of cines whose datalist row does not say")
    label.add_argument("--host", default="127.0.0.1", help="another one asks for a token")
    label.add_argument("--port", type=int, default=8000, help="0 for any that is free (8000)")
    label.add_argument("--certificate", metavar="PEM", help="for https")
    label.add_argument("--key", metavar="PEM", help="of the certificate")
    label.add_argument("--readers", type=int, default=1, help="processes that read cines (1)")
    label.add_argument("--tracking-uri", metavar="URI", help="MLflow's (STUDIES-label-private)")
    labels = commands.add_parser("labels", help="saved labels on their source's own frames")
    labels.add_argument("work", help="the folder of a label server (STUDIES-label)")
    labels.add_argument("out", help="new folder; its names are those of the archive")
    labels.add_argument("--studies", metavar="DIR", help="the archive, for NIfTI's own geometry")
    labels.add_argument("--tag", default="final", help="which labels (final)")
    labels.add_argument("--dicom", action="store_true", help="DICOM, for an archive (push)")
    labels.add_argument(
        "--model", metavar="FILE", help="whose structures, where a label does not say (as in label)"
    )
    pull = commands.add_parser("pull", help="ultrasound cines out of a DICOMweb archive")
    pull.add_argument("url", help="https://HOST/dicom-web, say")
    pull.add_argument("folder", help="new, or to go on with; it will name patients")
    pull.add_argument("--study", action="append", default=[], metavar="UID", help="repeatable")
    pull.add_argument("--patient", action="append", default=[], metavar="ID", help="repeatable")
    push = commands.add_parser("push", help="labels as DICOM into a DICOMweb archive")
    push.add_argument("folder", help="what labels --dicom wrote")
    push.add_argument("url", help="https://HOST/dicom-web, say")
    for command in (pull, push):
        command.add_argument(
            "--plain-http", action="store_true", help="unencrypted, even to another machine"
        )
    mlflow = commands.add_parser("mlflow", help="MLflow's pages over a store, on this machine")
    mlflow.add_argument("store", nargs="?", default="output/mlruns.db", help="(output/mlruns.db)")
    mlflow.add_argument("--port", type=int, default=5000, help="of the address (5000)")
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


def _reidentify(arguments: argparse.Namespace) -> int:
    from discovr_monai.base.tables import shown
    from discovr_monai.data.archive.prepare import reidentify

    for entry in reidentify(arguments.private, arguments.salt):
        if not arguments.ids or {entry["id"], entry["patient"]} & set(arguments.ids):
            print(entry["id"], entry["patient"], entry["patient_id"], shown(entry["source"]))
    return 0


def _shards(arguments: argparse.Namespace) -> int:
    from discovr_monai.data.archive.shards import pack

    count = pack(arguments.prepared, arguments.out, gb=arguments.gb, seed=arguments.seed)
    print(f"{count} shards. Train with --dataset_dir OUT --shard_window 4")
    return 0


def _model(arguments: argparse.Namespace) -> int:
    from discovr_monai.evaluation.heads.saved import bundle_heads

    bundle_heads(arguments.checkpoint, arguments.head, arguments.output)
    return 0


def _export(arguments: argparse.Namespace) -> int:
    from discovr_monai.base.notice import NOTICE
    from discovr_monai.inference.export import export_model

    export_model(
        arguments.model,
        arguments.folder,
        arguments.format,
        arguments.part,
        arguments.branch,
        arguments.pooling,
        tell=print,
    )
    print(NOTICE)
    return 0


def _convert(arguments: argparse.Namespace) -> int:
    from discovr_monai.weights import convert
    from discovr_monai.weights.positions import Wanted

    if arguments.to_released:
        lines = convert.to_released(arguments.source, arguments.output)
    else:
        sizes = ("image_size", "num_frames", "num_heads", "decoder_num_heads")
        options = ("layout", "stride", "mean", "std", "licence")
        lines = convert.convert(
            arguments.source,
            arguments.output,
            wanted=Wanted(**{name: getattr(arguments, name) for name in sizes}),
            **{name: getattr(arguments, name) for name in options},
        )
    print("\n".join(lines))
    return 0


def _download(arguments: argparse.Namespace) -> int:
    from discovr_monai.weights import download as hub

    if arguments.name == "list":
        for name, entry in hub.REGISTRY.items():
            print(f"{name:14} {entry.note}. Licence: {entry.licence}. From: {entry.url}")
        return 0
    file = hub.download(
        arguments.name,
        arguments.to,
        sha256=arguments.sha256,
        accept_unverified=arguments.accept_unverified,
    )
    print(f"Licence: {hub.licence_beside(file)}")
    print(f"SHA-256: {hub.recorded_hash(file)}")
    print(f"File: {file.name} in {arguments.to or 'the cache (DISCOVR_MONAI_CACHE)'}")
    return 0


def _nearest(arguments: argparse.Namespace) -> int:
    from discovr_monai.inference.search import find_nearest

    for row in find_nearest(arguments.embeddings, arguments.id, arguments.k):
        ef = f"EF {row['ef']:.0f} %" if row.get("ef") is not None else ""
        print(f"{row['similarity']:7.4f}  {row['id']}  study {row['study']}  {ef}".rstrip())
    return 0


def _label(arguments: argparse.Namespace) -> int:
    from discovr_monai.label.server.start import serve

    options = ("work", "host", "port", "view", "certificate", "key", "readers", "tracking_uri")
    serve(
        arguments.studies,
        _model_file(arguments.model),
        **{name: getattr(arguments, name) for name in options},
    )
    return 0


def _labels(arguments: argparse.Namespace) -> int:
    from discovr_monai.label.archive.studies import export_labels

    structures = None
    if arguments.dicom:
        from discovr_monai.weights.files import read_checkpoint

        heads = read_checkpoint(_model_file(arguments.model))["about"].get("heads", {})
        structures = heads.get("segmentation", {}).get("structures", [])
    written = export_labels(
        arguments.work, arguments.out, arguments.tag, arguments.studies, structures
    )
    counts = Counter(written.values())
    failed = sum(n for how, n in counts.items() if how.startswith("nothing"))
    print(
        f"{len(written) - failed} label maps written. They bear the archive's names: not for "
        "sharing"
    )
    for how, number in counts.most_common():
        print(f"  {number:6} {how}")
    return 0


def _pull(arguments: argparse.Namespace) -> int:
    from discovr_monai.label.archive.dicomweb import pull

    counts = pull(
        arguments.url,
        arguments.folder,
        arguments.study,
        arguments.patient,
        plain_http=arguments.plain_http,
    )
    aside = counts["set aside"]
    print(
        f"{counts['fetched']} cines fetched, {counts['there']} were there, {aside} set aside"
        f"{' (reasons in bad_files.csv)' if aside else ''}. They name their patients: not for "
        "sharing. Next: discovr-monai label --studies DIR"
    )
    return 0


def _push(arguments: argparse.Namespace) -> int:
    from discovr_monai.label.archive.dicomweb import push

    counts = push(arguments.folder, arguments.url, plain_http=arguments.plain_http)
    print(f"{counts['stored']} files stored, {counts['refused']} refused: see pushed.csv")
    return 1 if counts["refused"] else 0


def _model_file(given: str | None) -> Path:
    """The model's file, the bundle's own if none is named."""
    own = Path(__file__).parents[1] / "bundles" / "discovr" / "models" / "model.pt"
    here = Path("models") / "model.pt"
    if given is None and not here.is_file() and not own.is_file():
        raise ValueError("no model is named and the bundle's is not here: name one by --model")
    return Path(given) if given else here if here.is_file() else own


def _mlflow(arguments: argparse.Namespace) -> int:
    from discovr_monai.base.tracking import serve

    serve(arguments.store, arguments.port)
    return 0


_COMMANDS = {
    "mlflow": _mlflow,
    "label": _label,
    "labels": _labels,
    "pull": _pull,
    "push": _push,
    "nearest": _nearest,
    "phantom": _phantom,
    "datalist": _datalist,
    "prepare": _prepare,
    "reidentify": _reidentify,
    "shards": _shards,
    "scan": _scan,
    "model": _model,
    "export": _export,
    "convert": _convert,
    "download": _download,
}

if __name__ == "__main__":
    sys.exit(main())
