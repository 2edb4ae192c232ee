"""Small helpers that the bundle's YAML calls: checks, what MLflow records, words for the screen."""

from __future__ import annotations

import ast
import difflib
import inspect
import pydoc
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from monai.bundle.config_item import ConfigComponent
from monai.bundle.reference_resolver import ReferenceResolver
from torch import nn

from discovr_monai.base.files import save_atomic
from discovr_monai.base.tracking import store_file

# what `monai.bundle run` itself understands
RUN_OPTIONS = {
    "run_id", "init_id", "final_id", "meta_file", "config_file", "logging_file", "tracking",
    "args_file", "workflow_name", "workflow_type",
}  # fmt: skip
# keys that stood at the top of train.yaml, and where each value stands now
MOVED = {
    "cache_dir": "loader#store#directory",
    "cache_gb": "loader#store#max_gb",
    "train_section": "train#dataset#data#section",
    "normal_only": "train#dataset#data#normal_only",
    "val_fraction": "data#val_fraction",
    "sector_mask": "loader#sector",
    "duration": "clip#duration",
    "default_fps": "clip#default_fps",
    "pad_mode": "clip#pad_mode",
    "crop_scales": "crop#scales",
    "augment": "augmentation#strengths",
    "speed": "sampling#speed",
    "mean": "clip#mean",
    "std": "clip#std",
    "shard_window": "train#sampler#window",
    "decoder_dim": "decoder_def#embed_dim",
    "decoder_depth": "decoder_def#depth",
    "decoder_heads": "decoder_def#num_heads",
    "head_outputs": "video_head_def#out_dim",
    "head_hidden": "video_head_def#hidden_dim",
    "head_bottleneck": "video_head_def#bottleneck_dim",
    "head_norm": "video_head_def#norm",
    "image_frame_step": "network_def#image_frame_step",
    "teacher_keep": "masking#teacher_keep",
    "activation_checkpointing": "accelerated#activation_checkpointing",
    "compile": "accelerated#compile",
    "centring": "loss#terms#video#centring",
    "student_temperature": "loss#terms#video#student_temperature",
    "teacher_temperature": "teacher_temperature_schedule#start, teacher_temperature_schedule#end",
    "teacher_momentum": "train#trainer#teacher_momentum#start, train#trainer#teacher_momentum#end",
    "centre_momentum": "network_def#centre_momentum",
    "cluster_temperature": "loss#terms#cluster#temperature",
    "sinkhorn_eps": "loss#terms#cluster#eps",
    "sinkhorn_iterations": "loss#terms#cluster#iterations",
    "assignments": "loss#terms#cluster#assignments",
    "accumulation_steps": "train#trainer#accumulation_steps",
    "weight_decay": "optimizer#params#weight_decay",
    "betas": "optimizer#betas",
    "gradient_clip": "train#trainer#gradient_clip",
    "save_every": "checkpoints#save_every",
    "max_skipped": "train#trainer#max_skipped",
    "pictures_every": "train#handlers#4#every",
    "diagnose_every": "train#trainer#diagnose_every",
}
GONE = {"sinkhorn_chunk": "Sinkhorn always takes all tokens at once: leave the key out"}
# never recorded: most may be a path or somebody's name, even where they look like a number
NOT_RECORDED = {
    "bundle_root", "demo_dir", "dataset_dir", "datalist", "output_dir", "cache_dir", "init",
    "resume", "experiment_name", "run_name", "tracking_uri", "train_section",
    "save_execute_config", "record", "_meta_",
}  # fmt: skip
# settings in words that are a choice of few; other words could be a path or a person's name
CHOICES = {
    "preset", "precision", "strategy", "sector_mask", "pad_mode", "head_norm", "centring",
    "assignments",
}  # fmt: skip


def check_command_line(argv: Sequence[str] | None = None) -> None:
    """Refuses keys that no config knows, and makes errors end in one clear line.

    MONAI silently adds a misspelt key; this looks at what ``--config_file`` names: the first
    file knows the keys, overlays and ``--key value`` may only change them, at any depth. Does
    nothing where the command line is not a bundle's.

    Raises:
        ValueError: naming the key and the nearest known one, or the place that it moved to.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    options = _options(arguments)
    if "config_file" not in options:
        return
    show_errors_in_one_line()
    files = _as_list(options["config_file"])
    configs = [_read(file) for file in files]
    known = _flat(configs[0])
    for file, config in zip(files[1:], configs[1:], strict=True):
        for key, value in config.items():
            place = key.replace("::", "#").lstrip("+")
            if isinstance(value, dict) and "_target_" in value and "#" in place:
                place = place.rpartition("#")[0]  # another component, such as a term of the loss
            _check(place, known, f"{Path(file).name}: ")
    for config in configs[1:]:
        known |= _flat(config)
    for key in options:
        path = key.replace("::", "#")
        if path.split("#")[0] in RUN_OPTIONS:
            continue
        _check(path, known, "--")
        if isinstance(known.get(path), bool) and options[key] not in ("True", "False"):
            raise ValueError(f"--{path} {options[key]}: write True or False, with a capital letter")


def _check(key: str, known: Mapping[str, Any], where: str) -> None:
    """Raises a ValueError unless the configs have this key, or a component may take it."""
    parts = key.split("#")
    for depth in range(1, len(parts) + 1):
        prefix, parent = "#".join(parts[:depth]), "#".join(parts[: depth - 1])
        if prefix in known:
            continue
        if prefix in GONE:
            raise ValueError(f"{where}{prefix} is gone. {GONE[prefix]}")
        if prefix in MOVED and MOVED[prefix].split(", ")[0] in known:
            raise ValueError(f"{where}{prefix} is now {MOVED[prefix].replace(', ', ' and ')}")
        shared = known.get(parent)
        if isinstance(shared, str) and shared.startswith("@"):
            place = "#".join([shared[1:], *parts[depth - 1 :]])
            raise ValueError(f"{where}{key} is now {place}")
        candidates = set(known)
        if f"{parent}#_target_" in known:
            taken = _arguments(known[f"{parent}#_target_"])
            if taken is None or parts[depth - 1] in taken:
                return
            candidates |= {f"{parent}#{name}" for name in taken}
        hint = _nearest(prefix, candidates)
        raise ValueError(f"{where}{prefix}: no config knows this key. {hint}")


def _nearest(key: str, candidates: set[str]) -> str:
    near = difflib.get_close_matches(key, sorted(candidates), n=1, cutoff=0.5)
    return f"Did you mean {near[0]!r}?" if near else "See docs/configs.md for all keys"


def _arguments(target: str) -> set[str] | None:
    """What a component takes; None where that cannot be told, or it takes anything."""
    component = pydoc.locate(target) if "." in target and not target.startswith("$") else None
    if not callable(component):
        return None
    try:
        arguments = inspect.signature(component).parameters
    except ValueError:  # written in C
        return None
    if any(argument.kind is argument.VAR_KEYWORD for argument in arguments.values()):
        return None
    return {*arguments, *ConfigComponent.non_arg_keys}


def _flat(config: Any, prefix: str = "") -> dict[str, Any]:
    """Every key of a config, "loss#terms#cluster" and "loss#terms#cluster#eps", with its value."""
    keys = {}
    pairs = config.items() if isinstance(config, dict) else enumerate(config)
    for key, value in pairs:
        place = f"{prefix}{key}".replace("::", "#")
        keys[place] = value
        if isinstance(value, (dict, list)):
            keys |= _flat(value, f"{place}#")
    return keys


def parameters(record: Mapping[str, Any], **computed: Any) -> dict[str, Any]:
    """What MLflow records of a training: the settings of its config, whichever way it was started.

    Called in an expression of the config. A setting is a plain key at the top of it, or one of
    ``MOVED``, which keeps its name in MLflow. Numbers, switches and lists of them are taken, and
    the words of ``CHOICES``; no path, no name and no device.

    Args:
        record: goes on top of the settings.
        computed: and so do these.

    >>> parameters({"preset": "demo"}, total_steps=110)  # in no config
    {'preset': 'demo', 'total_steps': 110}
    """
    config = _config_around()
    settings = {key: value for key, value in config.items() if "#" not in key}
    for key, places in MOVED.items():
        values = [_literal(config.get(place)) for place in places.split(", ")]
        if places.split(", ")[0] in config:
            settings[key] = values if len(values) > 1 else values[0]
    plain = {k: v for k, v in settings.items() if k not in NOT_RECORDED and _is_recorded(k, v)}
    return {**plain, **record, **computed}


def _config_around() -> dict[str, Any]:
    """The config that the running expression stands in: MONAI hands expressions no way to it."""
    frame = sys._getframe()
    while frame.f_back is not None:
        frame = frame.f_back
        resolver = frame.f_locals.get("self")
        if isinstance(resolver, ReferenceResolver):
            return {key.replace("::", "#"): i.get_config() for key, i in resolver.items.items()}
    return {}


def _literal(value: Any) -> Any:
    """An expression that is no more than a tuple of numbers, as a list."""
    if isinstance(value, str) and value.startswith("$("):
        try:
            return list(ast.literal_eval(value[1:]))
        except (ValueError, SyntaxError):
            return value
    return value


def _is_recorded(key: str, value: Any) -> bool:
    if isinstance(value, dict):
        return "_target_" not in value and all(_is_recorded("", v) for v in value.values())
    if isinstance(value, (list, tuple)):
        return all(_is_recorded("", v) for v in value)
    if isinstance(value, str):
        return key in CHOICES
    return value is None or isinstance(value, (bool, int, float))


def _read(file: str) -> dict[str, Any]:
    import json

    import yaml

    text = Path(file).read_text()
    return json.loads(text) if file.endswith(".json") else yaml.safe_load(text)


def _options(arguments: Sequence[str]) -> dict[str, str]:
    options = {}
    for position, word in enumerate(arguments):
        if word.startswith("--"):
            key, equals, value = word[2:].partition("=")
            if not equals and position + 1 < len(arguments):
                value = arguments[position + 1]
            options[key] = value
    return options


def _as_list(value: str) -> list[str]:
    if value.startswith("["):
        return list(ast.literal_eval(value))
    return value.split(",")


def show_errors_in_one_line() -> None:
    """From now on an error of ours that ends this process shows its message and no traceback."""
    sys.excepthook = _one_clear_error


def _one_clear_error(
    kind: type[BaseException], error: BaseException, traceback: TracebackType | None
) -> None:
    """Our own errors end in their message alone; others keep the traceback before it."""
    chain = [error]  # MONAI's wrapping, our message, perhaps a library's cause of it
    while chain[-1].__cause__ is not None:
        chain.append(chain[-1].__cause__)
    kinds = (ValueError, OSError, RuntimeError, ArithmeticError)
    for_users = next((e for e in chain if _is_ours(e) and isinstance(e, kinds)), None)
    if for_users is None:
        sys.__excepthook__(kind, error, traceback)
    print(f"\nError: {for_users or chain[-1]}", file=sys.stderr)


def _is_ours(error: BaseException) -> bool:
    """Whether our code raised it."""
    frame, ours = error.__traceback__, False
    while frame is not None:
        ours = "discovr_monai" in frame.tb_frame.f_globals.get("__name__", "")
        frame = frame.tb_next
    return ours


def resolve_precision(precision: str, device: torch.device) -> str:
    """ "auto" to "bf16" where the machine multiplies bf16 fast, else "fp32".

    >>> resolve_precision("fp32", torch.device("cpu"))
    'fp32'
    """
    if precision != "auto":
        return precision
    if device.type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported() else "fp32"
    fast = getattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)()
    return "bf16" if device.type == "cpu" and fast else "fp32"


def describe(network: nn.Module, preset: str, precision: str) -> str:
    """ "demo preset, 3.1 M trainable parameters, bf16"."""
    count = sum(p.numel() for p in network.parameters() if p.requires_grad)
    return f"Preset {preset}: {count / 1e6:.1f} M trainable parameters, {precision}"


def next_steps(output_dir: str, tracking_uri: str | None) -> str:
    """What a person does after a training; paths relative to where they are.

    Args:
        tracking_uri: of MLflow's store; None for none.
    """

    def near(path: Path) -> Path:
        whole = path.resolve()
        return whole.relative_to(Path.cwd()) if whole.is_relative_to(Path.cwd()) else path

    folder = near(Path(output_dir))
    lines = [f"Checkpoint: {folder / 'last.pt'} (lowest validation loss: {folder / 'best.pt'})"]
    store = store_file(tracking_uri) if tracking_uri else None
    if store is not None:
        lines.append(f"Next, look: discovr-monai mlflow {near(store)}")
    lines.append(
        "Evaluate:   python -m monai.bundle run evaluating --config_file configs/knn.yaml --ckpt "
        f"{folder / 'last.pt'} (labels in the datalist; also linear_probe, lvef, segmentation, "
        "anomaly)"
    )
    return "\n".join(lines)


def pack_bundle(bundle: str | Path, archive: str | Path) -> None:
    """A bundle folder as a zip that MONAI's tools and people unpack: no data, no outputs.

    Args:
        bundle: the folder; it becomes the archive's only top folder.
        archive: written whole or not at all; the same bytes for the same content.
    """
    import zipfile

    root = Path(bundle)
    kept = ("configs", "docs", "models", "LICENSE", "large_files.yml")
    files = sorted(
        f
        for part in kept
        for f in [root / part, *(root / part).rglob("*")]
        if f.is_file() and "__pycache__" not in f.parts
    )

    def write(temporary: Path) -> None:
        with zipfile.ZipFile(temporary, "w", zipfile.ZIP_DEFLATED) as out:
            for file in files:
                entry = zipfile.ZipInfo(str(root.name / file.relative_to(root)))
                entry.external_attr = 0o644 << 16
                out.writestr(entry, file.read_bytes(), zipfile.ZIP_DEFLATED)

    save_atomic(write, Path(archive))
