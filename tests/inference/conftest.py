"""A tiny model with both heads, fitted on phantoms."""

from __future__ import annotations

from pathlib import Path

import pytest
from monai.data import Dataset

from discovr_monai.data.clips.transforms import LoadCined
from discovr_monai.data.lists.scan import load_datalist
from discovr_monai.evaluation.features.encoders import EvaluatedEncoder
from discovr_monai.evaluation.features.extract import Features
from discovr_monai.evaluation.heads.saved import bundle_heads
from discovr_monai.evaluation.report.results import Results
from discovr_monai.evaluation.tasks.lvef import LVEF
from discovr_monai.evaluation.tasks.segmentation import Segmentation
from discovr_monai.inference.job import ArchiveInference
from discovr_monai.inference.model import EchoModel, load_model
from discovr_monai.inference.plan import find_cines
from discovr_monai.inference.reading import CineReader
from tests.evaluation.conftest import checkpoint, labelled  # noqa: F401


def make_heads(checkpoint: Path, data: Path, folder: Path) -> list[Path]:  # noqa: F811
    files = [folder / "ef.safetensors", folder / "segmentation.safetensors"]
    parts = {}
    for branch in ("video_teacher", "image_teacher"):
        encoder = EvaluatedEncoder(checkpoint, branch)
        loader = LoadCined(root=data, size=encoder.image_size)
        parts[branch] = (encoder, load_datalist(data, loader=loader, output_dir=folder), loader)
    encoder, rows, loader = parts["video_teacher"]
    sections = ("training", "validation", "test")
    features = Features(encoder, rows, loader, sections, folder / "features.npz")
    results = Results("lvef", folder / "lvef", draws=20)
    LVEF(features, results, pooling="motion", coverage=0.8, save_head=files[0]).run()
    results = Results("segmentation", folder / "segmentation", draws=20)
    options = {"epochs": 4, "every_frame": False, "save_head": files[1]}
    Segmentation(*parts["image_teacher"], results, **options).run()
    return files


@pytest.fixture(scope="session")
def heads(checkpoint, labelled, tmp_path_factory) -> list[Path]:  # noqa: F811
    return make_heads(checkpoint, labelled, tmp_path_factory.mktemp("heads"))


@pytest.fixture(scope="session")
def model_file(checkpoint, heads, tmp_path_factory) -> Path:  # noqa: F811
    file = tmp_path_factory.mktemp("model") / "model.pt"
    bundle_heads(checkpoint, heads, file)
    return file


@pytest.fixture
def model(model_file) -> EchoModel:
    return load_model(model_file)


def infer(model: EchoModel, source: Path, out: Path, section: str | None = None, **options):
    """An :class:`ArchiveInference` over a folder or file."""
    root, rows = find_cines(source, None, section)
    loader = LoadCined(root=root, size=model.clip_shape[2])
    reader = CineReader(loader, model.clip_shape[1], model.about["clip"], 3, 0.5)
    return ArchiveInference(model, Dataset(rows), reader, out, **options)
