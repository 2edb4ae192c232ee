"""The app that MONAI Label loads: in the server, and in the processes of trainings and scorings."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import discovr_monai.label.server.standins  # noqa: F401  before any module of MONAI Label

# isort: split
from monailabel.interfaces.app import MONAILabelApp
from monailabel.tasks.activelearning.first import First

from discovr_monai.base.distributed import local_device
from discovr_monai.base.notice import NOTICE
from discovr_monai.label.archive.datastore import CineDatastore
from discovr_monai.label.archive.identifiers import check_id, check_tag
from discovr_monai.label.archive.studies import Studies
from discovr_monai.label.learn.versions import Versions
from discovr_monai.label.server import tasks
from discovr_monai.label.server.batch import CineBatch
from discovr_monai.label.server.infer import CineAnalyst, CineConfidence, CineInference
from discovr_monai.label.server.scoring import scorings


class DiscovrLabel(MONAILabelApp):
    """Cines of an archive, contours and EF by a frozen backbone and its heads.

    Args:
        app_dir: this folder.
        studies: :attr:`Studies.work`.
        conf: "model" (a file), "source" (the archive), "tracking_uri" (MLflow's store of the
            trainings), "view" ("" is unknown), "seconds".
    """

    def __init__(self, app_dir: str, studies: str, conf: dict[str, str]) -> None:
        self.archive = Studies(Path(conf["source"]), Path(studies))
        self.versions = Versions.of(self.archive.private / "models", Path(conf["model"]))
        self.tracking_uri = conf["tracking_uri"]
        self.analyst = CineAnalyst(
            self.versions,
            self.archive,
            local_device(),
            conf.get("view") or None,
            float(conf.get("seconds") or 600),
        )
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
            **tasks.infer_tasks(self.analyst),
        }

    def init_trainers(self) -> dict[str, Any]:
        """Trainings."""
        return tasks.trainers(self.analyst, self.versions, self.tracking_uri)

    def init_strategies(self) -> dict[str, Any]:
        """What to annotate next."""
        return {**tasks.strategies(self.analyst), "first": First()}

    def init_scoring_methods(self) -> dict[str, Any]:
        """Scorings."""
        return scorings(self.analyst, self.versions)

    # ---- where MONAI Label would trust a request ---------------------------------------------

    def init_datastore(self) -> CineDatastore:
        """Of this folder and no other place: an address is no studies folder."""
        return CineDatastore(self.studies, len(self.analyst.model.structures) or None)

    def init_batch_infer(self) -> CineBatch:
        """One cine after another."""
        return CineBatch()

    def infer(self, request: dict[str, Any], datastore: Any = None) -> dict[str, Any]:
        """As in the base class, for images of the datastore only.

        Raises:
            ValueError: for a path, or an image that is not there.
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
