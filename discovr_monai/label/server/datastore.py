"""MONAI Label's local datastore, such that a kill loses nothing and several may write."""

from __future__ import annotations

import gzip
import json
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

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
from discovr_monai.label.archive.identifiers import check_filename, check_id, check_tag
from discovr_monai.label.archive.saved import FINAL, SUFFIX
from discovr_monai.label.archive.studies import presented, replace_file

KNOWN = ("view", "patient", "study", "fps", "spacing", "frames")  # of a record, shown to clients
Objects = dict[str, ImageLabelModel]


class CineDatastore(LocalDatastore):
    """A folder of presented cines and their labels.

    Every change reads, changes and writes the index under one lock of threads and processes. Files
    and index are on the disk before they replace their predecessors, and readers see what other
    processes wrote.

    Args:
        folder: :attr:`discovr_monai.label.archive.studies.Studies.work`.
        values: the largest label that may be saved, which is the number of structures; None for
            any.
    """

    def __init__(self, folder: str | Path, values: int | None = None) -> None:
        self._root, self._values = Path(folder), values
        self._mutex = threading.RLock()
        self._version: tuple[int, ...] = ()  # of the index's file that was read last
        super().__init__(str(folder), extensions=[f"*{SUFFIX}"], auto_reload=False)

    def _image(self, name: str) -> Path:
        return self._root / f"{name}{SUFFIX}"

    def _label(self, name: str, tag: str) -> Path:
        return self._root / "labels" / tag / f"{name}{SUFFIX}"

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
            if path.exists() and (version := _version(path)) != self._version:
                model = LocalDatastoreModel.model_validate_json(path.read_text())
                model.base_path = self._datastore_path
                self._model, self._version = model, version

    def _update_datastore_file(self, lock: bool = True) -> None:
        self._write(self._model)

    def _write(self, model: LocalDatastoreModel) -> None:
        content = json.dumps(model.model_dump(exclude={"base_path"}), indent=2, default=str)
        path = Path(self._datastore_config_path)
        replace_file(path, content.encode())
        self._model, self._version = model, _version(path)

    @contextmanager
    def _change(self) -> Iterator[Objects]:
        """The index's entries, which the block replaces; then they are written.

        Entries must not be changed in place: readers hold the old ones.
        """
        with self._mutex, FileLock(self._lock_file):
            model = self._datastore
            objects = dict(model.objects)
            yield objects
            if objects != model.objects or not Path(self._datastore_config_path).exists():
                self._write(model.model_copy(update={"objects": objects}))

    def _copied(self, objects: Objects, image_id: str) -> ImageLabelModel:
        """Puts a copy of an image's entry in its place, which may be changed."""
        if image_id not in objects:
            raise ImageNotFoundException(f"there is no image {image_id[:80]!r}")
        objects[image_id] = objects[image_id].model_copy(deep=True)
        return objects[image_id]

    def _reconcile_datastore(self) -> None:
        """Takes in the files that a kill left out of the index: the files are the truth."""
        with self._change() as objects:
            known = dict(objects)
            objects.clear()
            for file in sorted(self._root.glob(f"[!.]*{SUFFIX}")):
                name = file.name.removesuffix(SUFFIX)
                image = known[name].image if name in known else _entry(name)
                objects[name] = ImageLabelModel(image=image, labels={})
            for file in sorted(self._root.glob(f"labels/*/*{SUFFIX}")):
                name, tag = file.name.removesuffix(SUFFIX), file.parent.name
                if name in objects:
                    label = known[name].labels.get(tag) if name in known else None
                    objects[name].labels[tag] = label or _entry(name)

    # ---- what clients and tasks do -----------------------------------------------------------

    def take_in(self, records: Mapping[str, Mapping[str, Any]]) -> None:
        """Lists presented cines, with what is known of them (nothing that names anybody)."""
        with self._change() as objects:
            for name, record in records.items():
                if "window" in record and self._image(name).exists():
                    objects.setdefault(name, ImageLabelModel(image=_entry(name)))
                    info = {key: record.get(key) for key in KNOWN}
                    self._copied(objects, name).image.info.update(info)

    def add_image(self, image_id: str, image_filename: str, image_info: dict[str, Any]) -> str:
        """Takes a NIfTI cine that was sent; keeps its sector and geometry, but not its header.

        Raises:
            ValueError: for a bad id or one that is taken.
            CineError: for a file that is no cine.
        """
        source = Path(image_filename)
        check_filename(source.name)
        name = check_id(image_id)
        content, record = presented(read_cine(source, name=name), source, name)
        entry = _entry(name)
        entry.info |= (image_info or {}) | {k: record[k] for k in ("fps", "spacing", "frames")}
        with self._change() as objects:
            if name in objects:
                raise ValueError(f"there is an image {name!r}: choose another id")
            replace_file(self._image(name), content)
            objects[name] = ImageLabelModel(image=entry)
        return name

    def save_label(
        self, image_id: str, label_filename: str, label_tag: str, label_info: dict[str, Any]
    ) -> str:
        """Saves a label map; when it returns, the label is on the disk.

        Raises:
            ValueError: for a bad tag, or a value that no structure has.
            CineError: for a label that does not lie on its image.
            ImageNotFoundException: there is no such image.
        """
        name, tag, source = check_id(image_id), check_tag(label_tag), Path(label_filename)
        check_filename(source.name)
        if not self.get_image_uri(name):
            raise ImageNotFoundException(f"there is no image {name!r}")
        content = self._checked(name, source)
        label = _entry(name)
        label.info |= label_info or {}
        with self._change() as objects:
            entry = self._copied(objects, name)
            replace_file(self._label(name, tag), content)
            entry.labels[tag] = label
        return name

    def _checked(self, name: str, label: Path) -> bytes | Path:
        """A label's file, or its content compressed, if it lies on its image."""
        import nibabel

        image: Any = nibabel.load(self._image(name))
        columns, rows, frames = image.shape
        largest = int(read_masks(label.parent, label.name, (frames, rows, columns)).max())
        if self._values is not None and largest > self._values:
            raise ValueError(
                f"the label has the value {largest}, the model knows 1 to {self._values}: remove "
                "the segments that it does not name, and keep the others in its order"
            )
        if label.name.lower().endswith(SUFFIX):
            return label
        return gzip.compress(label.read_bytes(), compresslevel=1, mtime=0)

    def get_labeled_images(self, label_tag: str | None = None, labels: Any = None) -> list[str]:
        """Images with a label of the tag, "final" if none is named."""
        tag = check_tag(label_tag or FINAL)
        return [name for name, entry in self._datastore.objects.items() if tag in entry.labels]

    def get_unlabeled_images(self, label_tag: str | None = None, labels: Any = None) -> list[str]:
        """All other images."""
        labelled = set(self.get_labeled_images(label_tag))
        return [name for name in self._datastore.objects if name not in labelled]

    def update_image_info(self, image_id: str, info: dict[str, Any]) -> None:
        """Adds to what is known of an image."""
        with self._change() as objects:
            self._copied(objects, image_id).image.info.update(info)

    def update_label_info(self, label_id: str, label_tag: str, info: dict[str, Any]) -> None:
        """Adds to what is known of a label."""
        with self._change() as objects:
            labels = self._copied(objects, label_id).labels
            if label_tag not in labels:
                raise LabelNotFoundException(f"{label_id!r} has no label {label_tag[:80]!r}")
            labels[label_tag].info.update(info)

    def get_image_info(self, image_id: str) -> dict[str, Any]:
        """What is known of an image, without the place where it lies on the server."""
        info = super().get_image_info(image_id)
        info.pop("path", None)
        return dict(info)

    def get_dataset_archive(self, limit_cases: int | None) -> str:
        """A ZIP of what is labelled, which replaces the one before it."""
        if not self.datalist():
            raise ValueError("nothing is labelled yet: there is nothing to pack")
        made = Path(super().get_dataset_archive(limit_cases))
        kept = made.with_name("dataset.zip")
        made.replace(kept)
        return str(kept)


def _entry(name: str) -> DataModel:
    return DataModel(info={"ts": int(time.time()), "name": f"{name}{SUFFIX}"}, ext=SUFFIX)


def _version(file: Path) -> tuple[int, ...]:
    """Changes whenever a file is replaced."""
    stat = file.stat()
    return stat.st_mtime_ns, stat.st_ino, stat.st_size
