"""Small helpers that the bundle's YAML calls: checks, and words for the screen."""

from __future__ import annotations

import ast
import difflib
import sys
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import nn

from discovr_monai.base.files import save_atomic
from discovr_monai.base.tracking import store_file

# what `monai.bundle run` itself understands
RUN_OPTIONS = {
    "run_id", "init_id", "final_id", "meta_file", "config_file", "logging_file", "tracking",
    "args_file", "workflow_name", "workflow_type",
}  # fmt: skip


def check_command_line(argv: Sequence[str] | None = None) -> None:
    """Refuses keys that no config knows, and makes errors end in one clear line.

    MONAI silently adds a misspelt key; this looks at what ``--config_file`` names: the first
    file knows the keys, overlays and ``--key value`` may only change them. Does nothing where
    the command line is not a bundle's.

    Raises:
        ValueError: naming the key and the nearest known one.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    options = _options(arguments)
    if "config_file" not in options:
        return
    sys.excepthook = _one_clear_error
    files = _as_list(options["config_file"])
    configs = [_read(file) for file in files]
    known = _keys(configs[0])
    for file, config in zip(files[1:], configs[1:], strict=True):
        for key in config:
            _check(key.split("#")[0].split("::")[0], known, f"{Path(file).name}: ")
    known = known.union(*(_keys(config) for config in configs[1:]))
    for key in options:
        path = key.replace("::", "#")
        if path.split("#")[0] in RUN_OPTIONS:
            continue
        _check(path, known, "--")
        default = next((config[path] for config in reversed(configs) if path in config), None)
        if isinstance(default, bool) and options[key] not in ("True", "False"):
            raise ValueError(f"--{path} {options[key]}: write True or False, with a capital letter")


def _check(key: str, known: set[str], where: str) -> None:
    parts = key.split("#")
    for depth in range(1, len(parts) + 1):
        prefix = "#".join(parts[:depth])
        if prefix in known:
            continue
        if depth > 1 and any(p.isdigit() for p in parts[:depth]):
            return  # an item of a list
        if depth > 1 and f"{'#'.join(parts[: depth - 1])}#_target_" in known:
            return  # another argument of a component
        near = difflib.get_close_matches(prefix, sorted(known), n=1, cutoff=0.5)
        hint = f"Did you mean {near[0]!r}?" if near else "See docs/configs.md for all keys"
        raise ValueError(f"{where}{prefix}: no config knows this key. {hint}")


def _keys(config: dict[str, Any], prefix: str = "") -> set[str]:
    found = set()
    for key, value in config.items():
        found.add(f"{prefix}{key}")
        if isinstance(value, dict):
            found |= _keys(value, f"{prefix}{key}#")
    return found


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


def _one_clear_error(
    kind: type[BaseException], error: BaseException, traceback: TracebackType | None
) -> None:
    """Our own errors end in their message alone; others keep the traceback before it."""
    chain = [error]  # MONAI's wrapping, our message, perhaps a library's cause of it
    while chain[-1].__cause__ is not None:
        chain.append(chain[-1].__cause__)
    known = (ValueError, OSError, RuntimeError, ArithmeticError)
    told = next((e for e in chain if _is_ours(e) and isinstance(e, known)), None)
    if told is None:
        sys.__excepthook__(kind, error, traceback)
    print(f"\nError: {told or chain[-1]}", file=sys.stderr)


def _is_ours(error: BaseException) -> bool:
    """Whether our code raised it."""
    frame, ours = error.__traceback__, False
    while frame is not None:
        ours = "discovr_monai" in frame.tb_frame.f_globals.get("__name__", "")
        frame = frame.tb_next
    return ours


def resolve_precision(precision: str, device: torch.device) -> str:
    """ "auto" to "bf16" where the machine multiplies bf16 fast, else "fp32"."""
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
