"""The model for MONAI Label's own bundle app, which runs it from a folder of configs.

    python -m discovr_monai.label.server.stock start_server --app OUT --studies DIR-label \
      --host 127.0.0.1 --conf models discovr_segmentation --conf zoo_source local

What that app does not protect is in docs/annotation.md.
"""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Hashable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from monai.data import MetaTensor
from monai.transforms import MapTransform
from torch import Tensor, nn

from discovr_monai.base.notice import NOTICE
from discovr_monai.data.clips.transforms import LoadCined
from discovr_monai.data.write.labels import full_frame_labels
from discovr_monai.inference.findings import Analyst
from discovr_monai.inference.model import EchoModel, load_model
from discovr_monai.inference.reading import CineReader, Seen

NAME = "discovr_segmentation"  # the app reads the kind of task from it
PLACE = Path("monailabel") / "sample-apps" / "monaibundle"


class ReadCined(MapTransform):
    """A NIfTI cine's path to what the network sees: (1, T, S, S), with the whole cine in its meta.

    Args:
        keys: "image".
        size: S; num_frames: of a window.
        clip: how the checkpoint's clips were sampled.
        view: what the cines show, or None.
    """

    def __init__(
        self, keys: str, size: int, num_frames: int, clip: dict[str, Any], view: str | None
    ) -> None:
        super().__init__(keys)
        self.size, self.num_frames, self.clip, self.view = size, num_frames, clip, view

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """See the class.

        Raises:
            ValueError: if the file is no cine.
        """
        import nibabel

        found = dict(data)
        for key in self.key_iterator(found):
            path = Path(str(found[key]))
            loader = LoadCined(root=path.parent, size=self.size)
            reader = CineReader(loader, self.num_frames, self.clip, 3, 0.5)
            row = {
                "image": path.name,
                "id": path.name,
                **({"view": self.view} if self.view else {}),
            }
            read = reader(row)  # type: ignore[arg-type]
            if "bad" in read:
                raise ValueError(f"{path.name}: {read['bad'][1]}. {read['bad'][2]}")
            seen: Seen = read["seen"]
            image: Any = nibabel.load(path)
            meta = {"seen": seen, "spatial_shape": image.shape, "original_affine": image.affine}
            found[key] = MetaTensor(torch.from_numpy(seen.cine).float(), image.affine, meta)
        return found


class CineSegmenter(nn.Module):
    """Labels every frame of one cine, as :class:`discovr_monai.inference.findings.Analyst` does.

    Args:
        about: of the checkpoint.
    """

    def __init__(self, about: dict[str, Any]) -> None:
        super().__init__()
        self.model = EchoModel(about)

    def load_state_dict(self, state_dict: Mapping[str, Any], *_: Any, **__: Any) -> Any:
        """Strict, whatever is asked: the app goes on with a network that it could not load."""
        return super().load_state_dict(state_dict, strict=True)

    def forward(self, image: Tensor) -> Tensor:
        """(1, 1, T, S, S) of :class:`ReadCined` -> (1, 1, T, s, s) labels in the window.

        The meta of the result has "finding", the values of the cine's row.
        """
        seen: Seen = image.meta["seen"]  # type: ignore[attr-defined]
        finding = Analyst(self.model, image.device)([seen])[0]
        labels = finding.labels
        if labels is None:  # why is in the finding
            labels = np.zeros((seen.cine.shape[1], 1, 1), np.uint8)
        meta = {"finding": finding.values, "seen": seen}
        return MetaTensor(torch.from_numpy(labels)[None, None], meta=meta)


class FullFramed(MapTransform):
    """Labels (1, T, s, s) in the window to (1, X, Y, T) on the file's frames; says EF and volumes.

    Adds "result", which the app hands to its clients.
    """

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """See the class."""
        found = dict(data)
        for key in self.key_iterator(found):
            meta = found[key].meta
            labels = np.asarray(found[key][0].cpu()).astype(np.uint8)
            full = full_frame_labels(labels, meta["seen"].window)  # (T, H, W)
            volume = torch.from_numpy(np.ascontiguousarray(full.transpose(2, 1, 0)))[None]
            found[key] = MetaTensor(volume, found["image"].affine)
            hidden = ("id", "patient", "study", "windows")
            values = {k: v for k, v in meta["finding"].items() if k not in hidden}
            found["result"] = {**values, "notice": NOTICE}
        return found


def write_stock_app(out: str | Path, model: str | Path, view: str | None = None) -> str:
    """Makes a folder that MONAI Label's own bundle app runs from.

    Args:
        out: new or empty.
        model: with a segmentation head.
        view: what the cines show; without one the heads stay silent.

    Returns:
        What to type to start it.

    Raises:
        ValueError, OSError: with what to do.
    """
    out = Path(out)
    if out.exists() and any(out.iterdir()):
        raise ValueError(f"{out.name!r} holds other files. Name a new or empty folder")
    app = Path(sys.prefix) / PLACE
    if not app.is_dir():
        raise ValueError("MONAI Label's bundle app is not installed: make label")
    echo = load_model(model)
    if "segmentation" not in echo.heads:
        raise ValueError(f"{Path(model).name} has no head for contours: see discovr-monai model")
    shutil.copytree(app, out, dirs_exist_ok=True, ignore=shutil.ignore_patterns("__pycache__"))
    main = out / "main.py"
    standins = "discovr_monai.label.server.standins"  # modules that MONAI Label imports and we lack
    first = f"import {standins}\n"
    main.write_text(first + main.read_text())
    bundle = out / "model" / NAME
    for folder in ("configs", "models", "docs"):
        (bundle / folder).mkdir(parents=True, exist_ok=True)
    state = {f"model.{k}": v for k, v in echo.state_dict().items()}
    torch.save({"model": state}, bundle / "models" / "model.pt")
    (bundle / "configs" / "inference.yaml").write_text(
        f"# {NOTICE}\n" + yaml.safe_dump(_inference(echo, view), sort_keys=False)
    )
    metadata = json.dumps(_metadata(echo), indent=1)
    (bundle / "configs" / "metadata.json").write_text(metadata + "\n")
    (bundle / "docs" / "README.md").write_text(f"Made by discovr-monai label-bundle. {NOTICE}.\n")
    return (
        f"python -m discovr_monai.label.server.stock start_server --app {out.name} "
        f"--studies DIR-label --host 127.0.0.1 --conf models {NAME} --conf zoo_source local"
    )


def _inference(model: EchoModel, view: str | None) -> dict[str, Any]:
    """The config that the app reads."""
    here = "discovr_monai.label.server.stock"
    return {
        "bundle_root": ".",
        "device": "cpu",
        "network_def": {"_target_": f"{here}.CineSegmenter", "about": _plain(model.about)},
        "preprocessing": {
            "_target_": "Compose",
            "transforms": [
                {
                    "_target_": f"{here}.ReadCined",
                    "keys": "image",
                    "size": model.clip_shape[2],
                    "num_frames": model.clip_shape[1],
                    "clip": _plain(model.about["clip"]),
                    "view": view,
                }
            ],
        },
        "inferer": {"_target_": "SimpleInferer"},
        "postprocessing": {
            "_target_": "Compose",
            "transforms": [{"_target_": f"{here}.FullFramed", "keys": "pred"}],
        },
    }


def _metadata(model: EchoModel) -> dict[str, Any]:
    names = {"0": "background"} | {str(i): n for i, n in enumerate(model.structures, 1)}
    shape = {"spatial_shape": [None, *model.clip_shape[2:]], "num_channels": 1}
    return {
        "version": "0.1.0",
        "name": "DISCOVR contours",
        "description": f"Contours of heart ultrasound cines by DISCOVR. {NOTICE}",
        "network_data_format": {
            "inputs": {"image": {"type": "image", **shape}},
            "outputs": {"pred": {"type": "image", "channel_def": names, **shape}},
        },
    }


def _plain(value: Any) -> Any:
    """Lists and dicts only, as YAML has them."""
    return json.loads(json.dumps(value))


if __name__ == "__main__":
    import discovr_monai.label.server.standins  # noqa: F401  before any module of MONAI Label

    # isort: split
    from monailabel.main import Main

    Main().run()
