"""One clip of the beating-heart phantom with everything that is true of it.

:func:`simulate_cine` draws a clip from a seed. The heart follows from (seed, patient), the probe
and the timing from (seed, patient, clip).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np

from discovr_monai.phantom.heart import DISCS, Heart, draw_beat, draw_heart
from discovr_monai.phantom.ultrasound import Scanner, draw_probe


@dataclass(frozen=True)
class PhantomCine:
    """One simulated clip and its truth.

    Attributes:
        frames: (T, H, W) uint8, 0 outside the sector.
        fps: frames per second.
        masks: (T, H, W) uint8: 0 background, 1 LV cavity, 2 LV myocardium, 3 left atrium.
        ef: percent; edv, esv: mL, of the drawn cavity by 20 single-plane discs.
        ed_frame, es_frame: end diastole and the end systole that follows it.
        heart_rate: beats per minute.
        population, kind: see phantom_heart; label: 0 normal, 1 abnormal.
        ed_chords, es_chords: (21, 4) x1, y1, x2, y2 in pixels: the long axis from apex to base,
            then 20 chords from apex to mitral plane.
        sector: (H, W) bool.
        volumes: (T,) mL, the drawn LV volume of each frame.
    """

    frames: np.ndarray
    fps: float
    masks: np.ndarray
    ef: float
    edv: float
    esv: float
    ed_frame: int
    es_frame: int
    heart_rate: float
    population: str
    kind: str
    label: int
    ed_chords: np.ndarray
    es_chords: np.ndarray
    sector: np.ndarray
    volumes: np.ndarray


def build_scanner(
    seed: int,
    *,
    num_frames: int = 96,
    size: int = 112,
    population: str | None = None,
    kind: str | None = None,
    patient: int = 0,
    clip: int = 0,
    gain: float = 0.0,
    depth: float = 1.0,
) -> Scanner:
    """Heart, timing and probe of one clip, ready to be drawn.

    Args:
        seed: of the data set.
        num_frames, size: of the clip: frames (at least 16), pixels per side (at least 32).
        population, kind: fix these instead of drawing them.
        patient, clip: clips of one patient share the heart.
        gain: dB added to what is drawn; depth: factor on what is drawn (another machine's habits).

    Returns:
        The scanner: ``cine()``, ``mask(frame)`` and ``material(frame)``.
    """
    if num_frames < 16 or size < 32:
        raise ValueError(
            f"num_frames={num_frames}, size={size}: a phantom needs at least 16 frames of 32 pixels"
        )
    if not 0.5 <= depth <= 2:
        raise ValueError(f"depth={depth}: the factor on the depth must lie in 0.5..2")
    heart = Heart(draw_heart(np.random.default_rng([seed, patient]), population, kind))
    rng = np.random.default_rng([seed, patient, clip + 1])
    beat = draw_beat(heart.parameters, num_frames, rng)
    probe = draw_probe(heart, rng)
    probe = replace(probe, gain=probe.gain + gain, depth=probe.depth * depth)
    return Scanner(heart, probe, beat, size)


def chords(scanner: Scanner, frame: int) -> np.ndarray:
    """(21, 4) float64 x1, y1, x2, y2 in pixels: long axis, then 20 chords from apex to base."""
    share = np.concatenate([[0.0, 1.0], (np.arange(DISCS) + 0.5) / DISCS])
    y, left, right = scanner.heart.contour(scanner.activation[frame], share).T
    left, right = left.copy(), right.copy()
    left[:2] = right[:2] = 0
    x1, y1 = scanner.to_pixels(left, y, frame)
    x2, y2 = scanner.to_pixels(right, y, frame)
    rows = np.stack([x1, y1, x2, y2], axis=1)
    axis = np.concatenate([rows[0, :2], rows[1, :2]])
    return np.concatenate([axis[None], rows[2:]])


def simpson(tracing: np.ndarray, pixel: float = 1.0) -> float:
    """Single-plane volume of a (21, 4) tracing; mL where ``pixel`` is its size in mm."""
    ends = tracing * pixel
    lengths = np.hypot(ends[:, 2] - ends[:, 0], ends[:, 3] - ends[:, 1])
    return float(np.pi / 4 * (lengths[1:] ** 2).sum() * lengths[0] / (len(ends) - 1) / 1000)


def truth_of(scanner: Scanner) -> dict[str, Any]:
    """What is known of a clip without drawing it; see :class:`PhantomCine` for the names."""
    beat, heart, parameters = scanner.beat, scanner.heart, scanner.heart.parameters
    volumes = heart.volumes(scanner.activation) * scanner.probe.foreshorten
    edv, esv = float(volumes[beat.ed_frame]), float(volumes[beat.es_frame])
    return {
        "ef": 100 * (1 - esv / edv),
        "edv": edv,
        "esv": esv,
        "fps": beat.fps,
        "ed_frame": beat.ed_frame,
        "es_frame": beat.es_frame,
        "heart_rate": parameters.heart_rate,
        "population": parameters.population,
        "kind": parameters.kind,
        "label": parameters.label,
        "ed_chords": chords(scanner, beat.ed_frame),
        "es_chords": chords(scanner, beat.es_frame),
        "volumes": volumes,
    }


def simulate_cine(
    seed: int,
    *,
    num_frames: int = 96,
    size: int = 112,
    population: str | None = None,
    kind: str | None = None,
) -> PhantomCine:
    """Simulates one clip; see :func:`build_scanner` for the arguments and their errors.

    >>> cine = simulate_cine(0, num_frames=16, size=32, population="adult", kind="normal")
    >>> cine.frames.shape, cine.frames.dtype, cine.label
    ((16, 32, 32), dtype('uint8'), 0)
    """
    scanner = build_scanner(
        seed, num_frames=num_frames, size=size, population=population, kind=kind
    )
    return PhantomCine(
        frames=scanner.cine(),
        masks=np.stack([scanner.mask(t) for t in range(num_frames)]),
        sector=scanner.sector,
        **truth_of(scanner),
    )


def encode_avi(frames: np.ndarray, fps: float, path: Path) -> None:
    """Write grey frames as MJPEG in AVI with neutral chroma."""
    import av

    with av.open(str(path), "w", format="avi") as container:
        stream: Any = container.add_stream("mjpeg", rate=Fraction(fps).limit_denominator(1001))
        stream.height, stream.width = frames.shape[1:]
        stream.pix_fmt = "yuvj420p"
        stream.codec_context.qmin = stream.codec_context.qmax = 2
        stream.codec_context.thread_count = 1
        chroma = np.full((frames.shape[1] // 2, frames.shape[2]), 128, np.uint8)
        for grey in frames:
            picture = av.VideoFrame.from_ndarray(np.concatenate([grey, chroma]), "yuvj420p")
            container.mux(stream.encode(picture))
        container.mux(stream.encode())
