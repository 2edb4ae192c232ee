"""MONAI Label's local datastore, such that a kill loses nothing and several may write."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import discovr_monai.label.server.standins  # noqa: F401  before any module of MONAI Label

# isort: split
from filelock import FileLock
from monailabel.datastore.local import (
    DataModel,
    ImageLabelModel,
    LocalDatastore,
    LocalDatastoreModel,
)
from monailabel.interfaces.exception import ImageNotFoundException, LabelNotFoundException

from discovr_monai.data.read.cine import read_cine
from discovr_monai.data.read.masks import read_masks
from discovr_monai.label.archive.identifiers import check_file, check_id, check_tag
from discovr_monai.label.archive.saved import FINAL, SUFFIX
from discovr_monai.label.archive.studies import presented, replace_file

KNOWN = ("view", "patient", "study", "fps", "spacing", "frames")  # of a record, shown to clients
Objects = dict[str, ImageLabelModel]


class CineDatastore(LocalDatastore):
    """A folder of presented cines and their labels.

    Every change is read, made and written under one lock of threads and processes; files and the
    index are on the disk before they replace what was there. Readers see what other processes
    wrote.

    Args:
        folder: :attr:`discovr_monai.label.archive.studies.Studies.work`.
        values: largest label that may be saved, the number of structures; None for any.
    """

    def __init__(self, folder: str | Path, values: int | None = None) -> None:
        self._values = values
        self._mutex = threading.RLock()
        self._seen: tuple[int, ...] = ()
        super().__init__(str(folder), extensions=[f"*{SUFFIX}"], auto_reload=False)

    # ---- the index ---------------------------------------------------------------------------

    @property
    def _datastore(self) -> LocalDatastoreModel:
        self._init_from_datastore_file()
        return self._model

    @_datastore.setter
    def _datastore(self, model: LocalDatastoreModel) -> None:
        self._model = model

    def _init_from_datastore_file(self, throw_exception: bool = False) -> None:
        """Reads the index if another process has replaced it."""
        path = Path(self._datastore_config_path)
        with self._mutex:
            try:
                stat = path.stat()
            except FileNotFoundError:
                return
            seen = (stat.st_mtime_ns, stat.st_ino, stat.st_size)
            if seen != self._seen:
                model = LocalDatastoreModel.model_validate_json(path.read_text())
                model.base_path = self._datastore_path
                self._model, self._seen = model, seen

    def _update_datastore_file(self, lock: bool = True) -> None:
        self._write(self._model)

    def _write(self, model: LocalDatastoreModel) -> None:
        content = json.dumps(model.model_dump(exclude={"base_path"}), indent=2, default=str)
        path = Path(self._datastore_config_path)
        replace_file(path, content.encode())
        stat = path.stat()
        self._model, self._seen = model, (stat.st_mtime_ns, stat.st_ino, stat.st_size)

    @contextmanager
    def _change(self) -> Iterator[Objects]:
        """The objects, to be replaced (not changed: readers hold the old ones) and then written."""
        with self._mutex, FileLock(self._lock_file):
            model = self._datastore
            objects = dict(model.objects)
            yield objects
            self._write(model.model_copy(update={"objects": objects}))

    def _own(self, objects: Objects, image_id: str) -> ImageLabelModel:
        """A copy of an image's entry, put in its place."""
        if image_id not in objects:
            raise ImageNotFoundException(f"there is no image {image_id[:80]!r}")
        objects[image_id] = objects[image_id].model_copy(deep=True)
        return objects[image_id]

    def _reconcile_datastore(self) -> None:
        """The files are the truth: what a kill left out of the index is taken in."""
        with self._mutex, FileLock(self._lock_file):
            model = self._datastore
            objects = self._from_files(model.objects)
            if objects != model.objects or not Path(self._datastore_config_path).exists():
                self._write(model.model_copy(update={"objects": objects}))

    def _from_files(self, known: Mapping[str, ImageLabelModel]) -> Objects:
        root = Path(self._datastore_path)
        objects: Objects = {}
        for file in sorted(root.glob(f"*{SUFFIX}")):
            name = file.name.removesuffix(SUFFIX)
            if not file.name.startswith("."):
                old = known.get(name)
                image = old.image if old else _entry(file.name)
                objects[name] = ImageLabelModel(image=image, labels={})
        for file in sorted(root.glob(f"labels/*/*{SUFFIX}")):
            name, tag = file.name.removesuffix(SUFFIX), file.parent.name
            if name in objects:
                old = known.get(name)
                label = old.labels.get(tag) if old else None
                objects[name].labels[tag] = label or _entry(file.name)
        return objects

    # ---- what clients and tasks do -----------------------------------------------------------

    def take_in(self, records: Mapping[str, Mapping[str, Any]]) -> None:
        """Lists what was presented, with what is known of it (nothing that names anybody)."""
        with self._change() as objects:
            for name, record in records.items():
                if (
                    "window" not in record
                    or not (Path(self._datastore_path) / f"{name}{SUFFIX}").exists()
                ):
                    continue
                if name in objects:
                    entry = self._own(objects, name)
                else:
                    entry = objects[name] = ImageLabelModel(image=_entry(f"{name}{SUFFIX}"))
                entry.image.info.update({k: record.get(k) for k in KNOWN})

    def add_image(self, image_id: str, image_filename: str, image_info: dict[str, Any]) -> str:
        """Takes a NIfTI cine that was sent; its sector and geometry are kept, its header is not.

        Raises:
            ValueError: for a bad id or one that is taken; CineError: for a file that is no cine.
        """
        source = Path(image_filename)
        check_file(source.name)
        name = check_id(image_id)
        content, record = presented(read_cine(source, name=name), source, name)
        with self._change() as objects:
            if name in objects:
                raise ValueError(f"there is an image {name!r}: choose another id")
            replace_file(Path(self._datastore_path) / f"{name}{SUFFIX}", content)
            entry = _entry(f"{name}{SUFFIX}")
            entry.info |= {**(image_info or {}), "fps": record["fps"], "spacing": record["spacing"]}
            entry.info |= {"frames": record["frames"]}
            objects[name] = ImageLabelModel(image=entry)
        return name

    def save_label(
        self, image_id: str, label_filename: str, label_tag: str, label_info: dict[str, Any]
    ) -> str:
        """Saves a label map; when it returns, it is on the disk.

        Raises:
            ValueError: for a bad tag; CineError: for a label that does not lie on its image.
            ImageNotFoundException.
        """
        name, tag, source = check_id(image_id), check_tag(label_tag), Path(label_filename)
        check_file(source.name)
        if not self.get_image_uri(name):
            raise ImageNotFoundException(f"there is no image {name!r}")
        content = self._checked(name, source)
        with self._change() as objects:
            entry = self._own(objects, name)
            replace_file(Path(self._datastore_path) / "labels" / tag / f"{name}{SUFFIX}", content)
            label = _entry(f"{name}{SUFFIX}")
            label.info |= label_info or {}
            entry.labels[tag] = label
        return name

    def _checked(self, name: str, label: Path) -> bytes | Path:
        """A label's file, or its bytes, compressed; it must lie on its image."""
        import gzip

        import nibabel

        image: Any = nibabel.load(self.get_image_uri(name))
        columns, rows, frames = image.shape
        found = int(read_masks(label.parent, label.name, (frames, rows, columns)).max())
        if self._values is not None and found > self._values:
            raise ValueError(
                f"the label has the value {found}, the model knows 1 to {self._values}: remove the "
                "segments that it does not name, and keep the others in its order"
            )
        if label.name.lower().endswith(SUFFIX):
            return label
        return gzip.compress(label.read_bytes(), compresslevel=1, mtime=0)

    def remove_image(self, image_id: str) -> None:
        """Removes an image and its labels; what is in the archive is presented again later."""
        with self._change() as objects:
            entry = self._own(objects, image_id)
            for tag in entry.labels:
                Path(self.get_label_uri(image_id, tag)).unlink(missing_ok=True)
            Path(self.get_image_uri(image_id)).unlink(missing_ok=True)
            del objects[image_id]

    def remove_label(self, label_id: str, label_tag: str) -> None:
        """Removes one label."""
        with self._change() as objects:
            entry = self._own(objects, label_id)
            if label_tag not in entry.labels:
                raise LabelNotFoundException(f"{label_id!r} has no label {label_tag[:80]!r}")
            Path(self.get_label_uri(label_id, label_tag)).unlink(missing_ok=True)
            del entry.labels[label_tag]

    def get_labeled_images(self, label_tag: str | None = None, labels: Any = None) -> list[str]:
        """Images with a label of the tag, "final" if none is named."""
        tag = check_tag(label_tag or FINAL)
        return [name for name, entry in self._datastore.objects.items() if tag in entry.labels]

    def get_unlabeled_images(self, label_tag: str | None = None, labels: Any = None) -> list[str]:
        """All others."""
        labelled = set(self.get_labeled_images(label_tag))
        return [name for name in self._datastore.objects if name not in labelled]

    def update_image_info(self, image_id: str, info: dict[str, Any]) -> None:
        """Adds to what is known of an image."""
        with self._change() as objects:
            self._own(objects, image_id).image.info.update(info)

    def update_label_info(self, label_id: str, label_tag: str, info: dict[str, Any]) -> None:
        """Adds to what is known of a label."""
        with self._change() as objects:
            entry = self._own(objects, label_id)
            if label_tag not in entry.labels:
                raise LabelNotFoundException(f"{label_id!r} has no label {label_tag[:80]!r}")
            entry.labels[label_tag].info.update(info)

    def get_image_info(self, image_id: str) -> dict[str, Any]:
        """What is known of an image, without the place where it lies on the server."""
        info = super().get_image_info(image_id)
        info.pop("path", None)
        return dict(info)

    def get_dataset_archive(self, limit_cases: int | None) -> str:
        """A ZIP of what is labelled; the one before it goes."""
        if not self.datalist():
            raise ValueError("nothing is labelled yet: there is nothing to pack")
        made = Path(super().get_dataset_archive(limit_cases))
        kept = made.with_name("dataset.zip")
        made.replace(kept)
        return str(kept)


def _entry(name: str) -> DataModel:
    return DataModel(info={"ts": int(time.time()), "name": name}, ext=SUFFIX)
