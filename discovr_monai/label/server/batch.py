"""Inference of many cines, one after the other.

MONAI Label's own batch inference needs a GPU, and ends at the first error.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from monailabel.interfaces.datastore import Datastore
from monailabel.interfaces.tasks.batch_infer import BatchInferTask

from discovr_monai.label.archive.identifiers import check_tag
from discovr_monai.label.archive.saved import FINAL, PROPOSED


class CineBatch(BatchInferTask):
    """Saves what a model says of the cines of a datastore as labels of a tag."""

    def __call__(
        self,
        request: Mapping[str, Any],
        datastore: Datastore,
        infer: Callable[[dict[str, Any], Datastore], Mapping[str, Any]],
    ) -> dict[str, str]:
        """Image id -> "saved", "nothing to save", or why it failed; a failure ends nothing.

        Args:
            request: "images" ("all", "labeled", "unlabeled" or ids), "label_tag" ("original"),
                "max_batch_size" (the number of cines, 0 for all), and what the model takes.
            datastore: of the cines and labels.
            infer: the app's inference of one request.

        Raises:
            ValueError: for the tag of what annotators have submitted.
        """
        tag = check_tag(str(request.get("label_tag") or PROPOSED))
        if tag == FINAL:
            raise ValueError(f"the tag {FINAL!r} is for what annotators submit: name another")
        images = sorted(self.get_images({**request, "label_tag": FINAL}, datastore))
        outcomes: dict[str, str] = {}
        for image in images[: int(request.get("max_batch_size") or len(images))]:
            one = {**request, "image": image, "save_label": True, "label_tag": tag}
            try:
                result = infer(one, datastore)
            except Exception as error:
                readable = isinstance(error, (ValueError, TimeoutError))  # others may name a path
                reason = f": {error}" if readable else f" ({type(error).__name__})"
                outcomes[image] = f"failed{reason}"
                continue
            if result.get("file"):
                Path(result["file"]).unlink(missing_ok=True)
            outcomes[image] = "saved" if result.get("label") else "nothing to save"
        return outcomes
