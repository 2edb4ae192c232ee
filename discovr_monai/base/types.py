"""The few records that cross package borders, with their shapes and units."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any, NamedTuple, TypedDict

if TYPE_CHECKING:
    import numpy as np
    import torch


class CineError(ValueError):
    """A cine that cannot be used: which file, what is wrong, what to do.

    Args:
        name: file name relative to the data root (never an absolute path).
        problem: what is wrong, with the bad value.
        remedy: what the user can do about it.
        kind: "unreadable" (broken or unsupported), "not a cine" (a still, text, ...) or "refused".
    """

    def __init__(self, name: str, problem: str, remedy: str, kind: str = "unreadable") -> None:
        name = name.encode("utf-8", "backslashreplace").decode()  # any name can be shown
        super().__init__(f"{name}: {problem}. {remedy}")
        self.name, self.problem, self.remedy, self.kind = name, problem, remedy, kind

    def __reduce__(self) -> tuple[Any, ...]:  # crosses process borders in workers
        return type(self), (self.name, self.problem, self.remedy, self.kind)


@dataclass(frozen=True, slots=True)
class Cine:
    """A decoded cine.

    Attributes:
        frames: (T, H, W) grey or (T, H, W, 3) RGB, uint8, 0..255.
        fps: frames per second, or None where the file does not tell.
        fps_source: where fps came from: "FrameTime", "FrameTimeVector", "CineRate",
            "RecommendedDisplayFrameRate", "container", "header" or "unknown".
        spacing: (row, column) pixel spacing in mm of the file's own frames, or None where the
            file does not tell.
        region: rows and columns of the one 2-D tissue region that a DICOM file names.
        from_dicom: whether it was read from DICOM.
        window: (H, W, top, left, height, width): the size of the file's frames and the part of
            them that was kept, before padding to a square and resizing.
        raw_screen: whether it may show a scanner's whole screen: DICOM always, other files when
            larger than 256 pixels on a side or not square (pre-cropped sets are small squares).
    """

    frames: np.ndarray
    fps: float | None
    fps_source: str
    spacing: tuple[float, float] | None = None
    region: tuple[slice, slice] | None = None
    from_dicom: bool = False
    window: tuple[int, int, int, int, int, int] | None = None

    @property
    def raw_screen(self) -> bool:
        """See above."""
        height, width = self.frames.shape[1:3]
        return self.from_dicom or max(height, width) > 256 or height != width


class PreparedCine(NamedTuple):
    """What the network is fed from.

    Attributes:
        frames: (T, H, W[, 3]) uint8, memory-mapped when it comes from the store.
        fps, fps_source, window: as in :class:`Cine`.
        spacing: (row, column) mm of the file's own frames, or None.
    """

    frames: np.ndarray
    fps: float | None
    fps_source: str
    window: tuple[int, int, int, int, int, int]
    spacing: tuple[float, float] | None = None


class DatalistRow(TypedDict, total=False):
    """One cine of a datalist; only ``image`` is required.

    ``image`` is a path relative to the data root, ``patient`` any string that is equal for
    cines of one patient, ``study`` likewise of one examination, ``id`` a salted name that may be
    logged, ``fps`` overrides the file's own and ``fps_source`` says where it is from, ``view`` is
    A4C, A2C, PSAX, PLAX, ..., ``fold`` the data set's own cross-validation fold, ``label`` is 0
    normal or 1 abnormal, ``ef`` percent, ``edv`` and ``esv`` mL, ``ed_frame`` and ``es_frame``
    count from 0, ``mask`` is a relative path to a (T, H, W) label map or a reference that
    :func:`discovr_monai.data.read.masks.read_masks` understands, ``spacing`` mm per pixel (row,
    column) of the frames as they are in the file, ``measurements`` lengths in mm by name,
    ``first`` where the cine begins in a shard of several.
    """

    image: str
    id: str
    patient: str
    study: str
    view: str
    fold: int
    split: str
    first: int
    fps: float
    fps_source: str
    num_frames: int
    label: int
    ef: float
    rvef: float
    edv: float
    esv: float
    ed_frame: int
    es_frame: int
    population: str
    kind: str
    site: str
    quality: str
    mask: str | dict[str, Any]
    spacing: list[float]
    measurements: dict[str, float]


# Of a field of DiscovrOutput: the branch that fills it, and the config key of the part of the
# network that takes a gradient through it ("" for none).
_IMAGE = {"branch": "image", "trains": ""}
_VIDEO = {"branch": "video", "trains": ""}


@dataclass(slots=True)
class DiscovrOutput:
    """Everything that the loss terms read. A field is None where its branch is off.

    This class is the one registry of these names: a term lists those that it reads in ``needs``,
    and each field says which branch fills it and which part of the network it trains.

    Shapes: V views, B clips, F frames per clip seen by the image branch, N video tokens,
    K_h head outputs, K prototypes, d image width.

    Attributes:
        image_logits: (V, B * F, K_h) student logits of the masked frames' CLS tokens.
        image_teacher_logits: (B * F, K_h).
        image_centre: (1, K_h) running mean of the teacher's logits.
        image_cls: (V + 1, B * F, d) CLS tokens: V student views, then the teacher's.
        target_tokens: (B, N, d) the image teacher's patch tokens z_i, standardised per frame, in
            raster (t, h, w) order: one frame for each tubelet.
        video_logits, video_teacher_logits, video_centre, video_cls: likewise, with B in place of
            B * F and the video width in place of d.
        video_scores: (B, N, K) cosine of the decoder's z_v with the prototypes, raster order.
        target_scores: (B, N, K) cosine of z_i with the prototypes, same places and times.
        pixels: (B, N, P) decoder output in pixel space, P = 3 * tubelet * p * p.
        pixel_targets: (B, N, P) the clip's own tubelets.
        global_mask: (B, N) bool, True where the decoder's view was masked.
    """

    image_logits: torch.Tensor | None = field(
        default=None, metadata=_IMAGE | {"trains": "image_head_def"}
    )
    image_teacher_logits: torch.Tensor | None = field(default=None, metadata=_IMAGE)
    image_centre: torch.Tensor | None = field(default=None, metadata=_IMAGE)
    image_cls: torch.Tensor | None = field(
        default=None, metadata=_IMAGE | {"trains": "image_head_def"}
    )
    target_tokens: torch.Tensor | None = field(default=None, metadata=_IMAGE)
    video_logits: torch.Tensor | None = field(
        default=None, metadata=_VIDEO | {"trains": "video_head_def"}
    )
    video_teacher_logits: torch.Tensor | None = field(default=None, metadata=_VIDEO)
    video_centre: torch.Tensor | None = field(default=None, metadata=_VIDEO)
    video_cls: torch.Tensor | None = field(
        default=None, metadata=_VIDEO | {"trains": "video_head_def"}
    )
    video_scores: torch.Tensor | None = field(
        default=None, metadata=_VIDEO | {"trains": "network_def#num_prototypes"}
    )
    target_scores: torch.Tensor | None = field(
        default=None, metadata=_VIDEO | {"trains": "network_def#num_prototypes"}
    )
    pixels: torch.Tensor | None = field(
        default=None, metadata=_VIDEO | {"trains": "network_def#reconstruct"}
    )
    pixel_targets: torch.Tensor | None = field(default=None, metadata=_VIDEO)
    global_mask: torch.Tensor | None = field(default=None, metadata=_VIDEO)

    def detached(self) -> DiscovrOutput:
        """The same values, from which no gradient goes back."""
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        return DiscovrOutput(**{n: v if v is None else v.detach() for n, v in values.items()})

    def joined(self, other: DiscovrOutput) -> DiscovrOutput:
        """The fields of both branches: those that are None here come from ``other``."""
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        return DiscovrOutput(
            **{n: getattr(other, n) if v is None else v for n, v in values.items()}
        )


# Name of a field -> {"branch": ..., "trains": ...}
OUTPUT_FIELDS: dict[str, Mapping[str, str]] = {f.name: f.metadata for f in fields(DiscovrOutput)}


class CheckpointError(ValueError):
    """A checkpoint that cannot be used; the message says why and what to do."""


class Stretch(NamedTuple):
    """Batches of one epoch that the same ranks read."""

    ranks: int
    batch_size: int  # per rank
    batches: int  # per rank
