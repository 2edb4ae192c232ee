"""Commands around the annotation server and the archives that it takes cines from."""

from __future__ import annotations

import argparse
from collections import Counter
from pathlib import Path

from discovr_monai.cli.types import Commands


def add(commands: Commands) -> None:
    """Adds these commands to the parser, in the order in which --help lists them."""
    _add_label(commands)
    _add_labels(commands)
    _add_pull(commands)
    _add_push(commands)


def _add_label(commands: Commands) -> None:
    parser = commands.add_parser("label", help="a MONAI Label server over an archive (make label)")
    parser.add_argument("--studies", required=True, metavar="DIR", help="the archive, read only")
    parser.add_argument("--work", metavar="DIR", help="cines presented and labels (STUDIES-label)")
    parser.add_argument("--model", metavar="FILE", help="with heads (the bundle's models/model.pt)")
    parser.add_argument("--view", help="A4C, ...: of cines whose datalist row does not say")
    parser.add_argument("--host", default="127.0.0.1", help="another one asks for a token")
    parser.add_argument("--port", type=int, default=8000, help="0 for any that is free (8000)")
    parser.add_argument("--certificate", metavar="PEM", help="for https")
    parser.add_argument("--key", metavar="PEM", help="of the certificate")
    parser.add_argument("--readers", type=int, default=1, help="processes that read cines (1)")
    parser.add_argument("--tracking-uri", metavar="URI", help="MLflow's (STUDIES-label-private)")
    parser.set_defaults(run=_label)


def _label(arguments: argparse.Namespace) -> int:
    from discovr_monai.label.server.start import serve

    options = ("work", "host", "port", "view", "certificate", "key", "readers", "tracking_uri")
    serve(
        arguments.studies,
        _model_file(arguments.model),
        **{name: getattr(arguments, name) for name in options},
    )
    return 0


def _add_labels(commands: Commands) -> None:
    parser = commands.add_parser("labels", help="saved labels on their source's own frames")
    parser.add_argument("work", help="the folder of a label server (STUDIES-label)")
    parser.add_argument("out", help="new folder; its names are those of the archive")
    parser.add_argument("--studies", metavar="DIR", help="the archive, for NIfTI's own geometry")
    parser.add_argument("--tag", default="final", help="which labels (final)")
    parser.add_argument("--dicom", action="store_true", help="DICOM, for an archive (push)")
    parser.add_argument(
        "--model", metavar="FILE", help="whose structures, where a label does not say (as in label)"
    )
    parser.set_defaults(run=_labels)


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


def _add_pull(commands: Commands) -> None:
    parser = commands.add_parser("pull", help="ultrasound cines out of a DICOMweb archive")
    parser.add_argument("url", help="https://HOST/dicom-web, say")
    parser.add_argument("folder", help="new, or to go on with; it will name patients")
    parser.add_argument("--study", action="append", default=[], metavar="UID", help="repeatable")
    parser.add_argument("--patient", action="append", default=[], metavar="ID", help="repeatable")
    parser.add_argument(
        "--plain-http", action="store_true", help="unencrypted, even to another machine"
    )
    parser.set_defaults(run=_pull)


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


def _add_push(commands: Commands) -> None:
    parser = commands.add_parser("push", help="labels as DICOM into a DICOMweb archive")
    parser.add_argument("folder", help="what labels --dicom wrote")
    parser.add_argument("url", help="https://HOST/dicom-web, say")
    parser.add_argument(
        "--plain-http", action="store_true", help="unencrypted, even to another machine"
    )
    parser.set_defaults(run=_push)


def _push(arguments: argparse.Namespace) -> int:
    from discovr_monai.label.archive.dicomweb import push

    counts = push(arguments.folder, arguments.url, plain_http=arguments.plain_http)
    print(f"{counts['stored']} files stored, {counts['refused']} refused: see pushed.csv")
    return 1 if counts["refused"] else 0


def _model_file(given: str | None) -> Path:
    """The named file, else models/model.pt here, else the bundle's own."""
    if given is not None:
        return Path(given)
    here = Path("models") / "model.pt"
    for file in (here, Path(__file__).parents[2] / "bundles" / "discovr" / here):
        if file.is_file():
            return file
    raise ValueError("no model is named and the bundle's is not here: name one by --model")
