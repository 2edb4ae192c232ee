"""Inference of many cines in turn: MONAI Label's own needs a GPU, and ends at the first error."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from monailabel.interfaces.datastore import Datastore
from monailabel.interfaces.tasks.batch_infer import BatchInferTask

from discovr_monai.label.archive.identifiers import check_tag
from discovr_monai.label.archive.saved import FINAL, PROPOSED


class CineBatch(BatchInferTask):
    """What a model says of the cines of a datastore, saved as labels of a tag."""

    def __call__(
        self,
        request: Mapping[str, Any],
        datastore: Datastore,
        infer: Callable[[dict[str, Any], Datastore], Mapping[str, Any]],
    ) -> dict[str, str]:
        """Image id -> "saved", "nothing to save", or why it failed; the others go on.

        Args:
            request: "images" ("all", "labeled", "unlabeled" or ids), "label_tag" ("original"),
                "max_batch_size" (so many only, 0 for all), and what the model takes.

        Raises:
            ValueError: for the tag of what annotators have submitted.
        """
        tag = check_tag(str(request.get("label_tag") or PROPOSED))
        if tag == FINAL:
            raise ValueError(f"the tag {FINAL!r} is for what annotators submit: name another")
        images = sorted(self.get_images({**request, "label_tag": FINAL}, datastore))
        done: dict[str, str] = {}
        for image in images[: int(request.get("max_batch_size") or len(images))]:
            ask = {**request, "image": image, "save_label": True, "label_tag": tag}
            try:
                found = infer(ask, datastore)
            except Exception as error:  # one cine, whatever it did
                told = isinstance(error, (ValueError, TimeoutError))
                done[image] = f"failed: {error}" if told else f"failed ({type(error).__name__})"
                continue
            if found.get("file"):
                Path(found["file"]).unlink(missing_ok=True)
            done[image] = "saved" if found.get("label") else "nothing to save"
        return done
