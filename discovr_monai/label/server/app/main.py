"""The app that MONAI Label loads: in the server, and in the processes of trainings and scorings."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import discovr_monai.label.server  # noqa: F401  its stand-ins, before any module of MONAI Label

# isort: split
from monailabel.interfaces.app import MONAILabelApp
from monailabel.tasks.activelearning.first import First

from discovr_monai.base.distributed import local_device
from discovr_monai.base.notice import NOTICE
from discovr_monai.label.archive.identifiers import check_id, check_tag
from discovr_monai.label.archive.studies import Studies
from discovr_monai.label.learn.versions import Versions
from discovr_monai.label.server.analyst import CineAnalyst
from discovr_monai.label.server.batch import CineBatch
from discovr_monai.label.server.datastore import CineDatastore
from discovr_monai.label.server.infer import CineConfidence, CineInference, CinePropagation
from discovr_monai.label.server.scoring import scorings
from discovr_monai.label.server.strategies import strategies
from discovr_monai.label.server.training import Finetuning


class DiscovrLabel(MONAILabelApp):
    """Cines of an archive, with contours and EF by a frozen backbone and its heads.

    Args:
        app_dir: this folder.
        studies: :attr:`Studies.work`.
        conf: "model" (a file), "source" (the archive), "tracking_uri" (MLflow's store of the
            trainings), "view" ("" is unknown).
    """

    def __init__(self, app_dir: str, studies: str, conf: dict[str, str]) -> None:
        archive = Studies(Path(conf["source"]), Path(studies))
        self.versions = Versions.of(archive.private / "models", Path(conf["model"]))
        view = conf.get("view") or None
        self.analyst = CineAnalyst(self.versions, archive, local_device(), view)
        self.has_contours = "segmentation" in self.analyst.model.heads
        super().__init__(
            app_dir=app_dir,
            studies=studies,
            conf=conf,
            name="DISCOVR echocardiography",
            description=f"Contours and EF of heart ultrasound cines. {NOTICE}",
            version="1",
            labels=list(self.analyst.model.structures),
        )

    # ---- tasks by name -----------------------------------------------------------------------

    def init_infers(self) -> dict[str, Any]:
        """Inference tasks."""
        return {
            "discovr_segmentation": CineInference(self.analyst),
            "discovr_confidence": CineConfidence(self.analyst),
            "discovr_propagation": CinePropagation(self.analyst),
        }

    def init_trainers(self) -> dict[str, Any]:
        """Trainings, if there is a head to train."""
        if not self.has_contours:
            return {}
        task = Finetuning(self.analyst, self.versions, self.conf["tracking_uri"])
        return {"discovr_segmentation": task}

    def init_strategies(self) -> dict[str, Any]:
        """What to annotate next."""
        return {**strategies(self.analyst), "first": First()}

    def init_scoring_methods(self) -> dict[str, Any]:
        """Scorings, if there is a head to score."""
        return scorings(self.analyst, self.versions) if self.has_contours else {}

    def init_batch_infer(self) -> CineBatch:
        """Inference of many cines, one after the other."""
        return CineBatch()

    # ---- where MONAI Label would trust a request ---------------------------------------------

    def init_datastore(self) -> CineDatastore:
        """Of this folder and no other place, such as an address."""
        return CineDatastore(self.studies, len(self.analyst.model.structures) or None)

    def infer(self, request: dict[str, Any], datastore: Any = None) -> dict[str, Any]:
        """As in the base class, for images of the datastore only.

        Raises:
            ValueError: for a path, or an image that does not exist.
        """
        image = check_id(str(request.get("image", "")))
        check_tag(str(request.get("label_tag", "original")))
        if not self.datastore().get_image_uri(image):
            raise ValueError(f"there is no image {image!r}")
        return dict(super().infer(request, datastore))

    def next_sample(self, request: dict[str, Any]) -> dict[str, Any]:
        """As in the base class, without the place where the image lies on the server."""
        sample = dict(super().next_sample(request))
        sample.pop("path", None)
        return sample
