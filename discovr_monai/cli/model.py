"""Commands about weights: bundle, export, convert and download them, search what they gave."""

from __future__ import annotations

import argparse

from discovr_monai.cli.types import Commands


def add(commands: Commands) -> None:
    """Adds these commands to the parser, in the order in which --help lists them."""
    _add_model(commands)
    _add_export(commands)
    _add_convert(commands)
    _add_download(commands)
    _add_nearest(commands)


def _add_model(commands: Commands) -> None:
    parser = commands.add_parser("model", help="teachers and heads in one file, for inference")
    parser.add_argument("checkpoint", help="last.pt or best.pt of a training, or a converted file")
    parser.add_argument("output", help="models/model.pt of the bundle, say")
    parser.add_argument(
        "--head", action="append", default=[], help="of --save_head in an evaluation; repeatable"
    )
    parser.set_defaults(run=_model)


def _model(arguments: argparse.Namespace) -> int:
    from discovr_monai.evaluation.heads.saved import bundle_heads

    bundle_heads(arguments.checkpoint, arguments.head, arguments.output)
    return 0


def _add_export(commands: Commands) -> None:
    parser = commands.add_parser("export", help="a model's networks for other runtimes, checked")
    parser.add_argument("model", help="models/model.pt of the bundle, or any checkpoint of ours")
    parser.add_argument("folder", help="where to: PART.onnx, PART.pt2, PART.ts, PART.int8.onnx")
    parser.add_argument(
        "--format", nargs="+", default=["onnx", "program"], metavar="FORMAT",
        help="onnx, program (torch.export), torchscript, int8 (onnx program)",
    )  # fmt: skip
    parser.add_argument(
        "--part", nargs="+", metavar="PART", help="embedding, ef, segmentation (all there are)"
    )
    parser.add_argument("--branch", default="video_teacher", help="of the embedding")
    parser.add_argument(
        "--pooling", default="cls", help="of the embedding: cls, mean, both, motion"
    )
    parser.set_defaults(run=_export)


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


def _add_convert(commands: Commands) -> None:
    parser = commands.add_parser(
        "convert", help="released weights (DISCOVR, VideoMAE, SIGMA, DINO, MAE) to ours, and back"
    )
    parser.add_argument("source", metavar="IN", help=".pth, .pt, .bin, .safetensors or .npz")
    parser.add_argument("output", metavar="OUT", help=".safetensors")
    parser.add_argument("--layout", default="auto", help="discovr, videomae or vit (auto)")
    parser.add_argument("--image-size", type=int, help="pixels, other than the file's")
    parser.add_argument("--num-frames", type=int, help="frames of a clip, other than the file's")
    parser.add_argument("--num-heads", type=int, help="of the encoders (usual for the width)")
    parser.add_argument("--decoder-num-heads", type=int, help="(usual for the width)")
    parser.add_argument("--stride", type=int, help="frames between samples (the layout's)")
    parser.add_argument("--mean", type=float, nargs=3, help="of intensities 0..1 (ImageNet's)")
    parser.add_argument("--std", type=float, nargs=3, help="(ImageNet's)")
    parser.add_argument("--licence", help="of the weights (what download wrote beside IN)")
    parser.add_argument(
        "--to-released", action="store_true", help="a file of ours to the released layout"
    )
    parser.set_defaults(run=_convert)


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


def _add_download(commands: Commands) -> None:
    parser = commands.add_parser("download", help="a released file, with its licence and hash")
    parser.add_argument("name", help="discovr-800, videomae-base, ...; 'list' shows them all")
    parser.add_argument("--to", metavar="DIR", help="folder (a cache in your home)")
    parser.add_argument("--sha256", help="the hash that it must have")
    parser.add_argument(
        "--accept-unverified", action="store_true", help="take it although nobody tells its hash"
    )
    parser.set_defaults(run=_download)


def _download(arguments: argparse.Namespace) -> int:
    from discovr_monai.weights import download

    if arguments.name == "list":
        for name, entry in download.REGISTRY.items():
            print(f"{name:14} {entry.note}. Licence: {entry.licence}. From: {entry.url}")
        return 0
    file = download.download(
        arguments.name,
        arguments.to,
        sha256=arguments.sha256,
        accept_unverified=arguments.accept_unverified,
    )
    print(f"Licence: {download.licence_beside(file)}")
    print(f"SHA-256: {download.recorded_hash(file)}")
    print(f"File: {file.name} in {arguments.to or 'the cache (DISCOVR_MONAI_CACHE)'}")
    return 0


def _add_nearest(commands: Commands) -> None:
    parser = commands.add_parser("nearest", help="the cines that are most like one of them")
    parser.add_argument("embeddings", help="embeddings.parquet of an inference")
    parser.add_argument("id", help="of a cine in it")
    parser.add_argument("--k", type=int, default=10, help="how many (10)")
    parser.set_defaults(run=_nearest)


def _nearest(arguments: argparse.Namespace) -> int:
    from discovr_monai.inference.search import find_nearest

    for row in find_nearest(arguments.embeddings, arguments.id, arguments.k):
        ef = f"EF {row['ef']:.0f} %" if row.get("ef") is not None else ""
        print(f"{row['similarity']:7.4f}  {row['id']}  study {row['study']}  {ef}".rstrip())
    return 0
