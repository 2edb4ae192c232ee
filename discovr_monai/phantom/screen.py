"""A scanner's whole screen around a phantom cine: what hospitals' files look like.

Burned-in name, date and hospital, menu, grey bar, depth marks, a coloured logo and orientation
mark, a running ECG strip and a changing heart rate; nothing of it covers the sector.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from scipy import ndimage

from discovr_monai.phantom.heart import Heart, draw_beat, draw_heart
from discovr_monai.phantom.ultrasound import Scanner, draw_probe

SIZES = ((480, 640), (600, 800), (708, 1016), (768, 1024))
TEXT = "#dfe6e9"


@dataclass(frozen=True)
class PhantomScreen:
    """One raw screen and its truth.

    Attributes:
        frames: (T, H, W, 3) uint8 RGB.
        fps: frames per second.
        spacing: mm per pixel.
        sector: (H, W) bool, the ultrasound sector.
        overlay: (H, W) bool, every pixel that text, marks, menu or ECG ever touch.
        region: (x0, y0, x1, y1) of the 2-D region, inclusive, as DICOM counts.
        ecg: (x0, y0, x1, y1) of the ECG strip.
    """

    frames: np.ndarray
    fps: float
    spacing: float
    sector: np.ndarray
    overlay: np.ndarray
    region: tuple[int, int, int, int]
    ecg: tuple[int, int, int, int]


def simulate_screen(seed: int, *, num_frames: int = 24, dark: bool | None = None) -> PhantomScreen:
    """Draws one screen; everything follows from the seed.

    Args:
        seed: any non-negative integer.
        num_frames: at least 16.
        dark: a low gain (True), a usual one (False), or by the seed (None; one in four is dark).
    """
    rng = np.random.default_rng([seed, 77])
    height, width = SIZES[rng.integers(len(SIZES))]
    heart = Heart(draw_heart(np.random.default_rng([seed, 0])))
    beat = draw_beat(heart.parameters, num_frames, rng)
    probe = draw_probe(heart, rng)
    low = rng.random() < 0.25 if dark is None else dark
    probe = replace(probe, gain=probe.gain - (6.0 if low else 0.0))
    strip = round(height * rng.uniform(0.06, 0.11))
    top = round(height * rng.uniform(0.05, 0.1))
    side = int(min(height - top - strip - 4, width * 0.72) * rng.uniform(0.8, 1.0)) // 2 * 2
    scanner = Scanner(heart, probe, beat, side)
    left = round((width - side) * rng.uniform(0.35, 0.75))
    near = rng.uniform(0.0, 0.06)  # the probe's own arc
    inside = scanner.sector & (_range(scanner) >= near)
    cine = scanner.cine() * inside
    sector = np.zeros((height, width), bool)
    sector[top : top + side, left : left + side] = inside
    box = (left, top, left + side - 1, top + side - 1)
    ecg = (left, height - strip, left + side - 1, height - 2)
    free = ~ndimage.binary_dilation(sector, iterations=3)
    static = _static(rng, (height, width), box)
    frames = np.zeros((num_frames, height, width, 3), np.uint8)
    overlay = np.zeros((height, width), bool)
    for t in range(num_frames):
        picture = static.copy()
        _moving(ImageDraw.Draw(picture), t, beat.fps, heart.parameters.heart_rate, ecg, box)
        graphics = np.array(picture) * free[..., None]
        overlay |= graphics.any(-1)
        frames[t] = graphics
        frames[t, top : top + side, left : left + side][inside] = cine[t][inside][:, None]
    return PhantomScreen(frames, beat.fps, scanner.pixel, sector, overlay, box, ecg)


def _range(scanner: Scanner) -> np.ndarray:
    """(size, size) distance from the apex as share of the depth."""
    steps = (np.arange(scanner.size) + 0.5) * scanner.pixel
    lateral, deep = (
        steps - scanner.size / 2 * scanner.pixel,
        steps - 0.0125 * scanner.size * scanner.pixel,
    )
    return np.asarray(np.hypot(lateral[None], deep[:, None]) / scanner.probe.depth)


def _font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(size)


def _static(
    rng: np.random.Generator, size: tuple[int, int], box: tuple[int, int, int, int]
) -> Image.Image:
    """What stands still: text, menu, grey bar, depth marks, logo, orientation mark."""
    height, width = size
    x0, y0, x1, y1 = box
    picture = Image.new("RGB", (width, height))
    draw = ImageDraw.Draw(picture)
    unit = height // 40
    number = int(rng.integers(10**6, 10**7))
    draw.text((unit, 2), f"DOE^JANE {number}", TEXT, _font(unit + 2))
    draw.text((width * 0.55, 2), "2026-03-14 09:26:53  GENERAL HOSPITAL", TEXT, _font(unit))
    lines = ("TIS 0.8  MI 1.3", "S5-1 / Adult", f"FR {rng.integers(40, 70)}Hz", "2D", "68%", "C 50")
    for i, line in enumerate(lines):
        draw.text((unit / 2, height * 0.12 + i * 1.6 * unit), line, TEXT, _font(unit))
    for i in range(8):  # the bar of greys
        level, step = 30 * (8 - i), height // 40
        draw.rectangle(
            (width - 2 * step, y0 + i * step, width - step, y0 + (i + 1) * step), (level,) * 3
        )
    for i in range(int(rng.integers(6, 15))):  # depth in cm, at the right edge of the region
        y = y0 + (y1 - y0) * i / 15
        draw.line((x1 - 4, y, x1, y), TEXT)
    colour = tuple(int(c) for c in rng.integers(80, 255, 3))
    cx, cy = x0 + (x1 - x0) * rng.uniform(0.2, 0.32), y0 + 1.2 * unit
    draw.ellipse((cx - unit, cy - unit, cx + unit, cy + unit), colour)
    draw.text((cx - unit / 3, cy - unit / 2), "V", "black", _font(unit))
    lx, ly = (x1 - 3 * unit, y1 - 2 * unit) if rng.random() < 0.5 else (x0, y1 - 2 * unit)
    draw.polygon([(lx, ly), (lx + 3 * unit, ly), (lx + 1.5 * unit, ly + 2 * unit)], colour)
    if rng.random() < 0.5:  # a menu over the left of the screen
        draw.rectangle((0, height * 0.5, unit * 6, height * 0.8), (40, 44, 52), TEXT)
        for i in range(4):
            draw.text((4, height * 0.52 + i * 2 * unit), f"Preset {i}", TEXT, _font(unit))
    return picture


def _moving(
    draw: ImageDraw.ImageDraw,
    frame: int,
    fps: float,
    rate: float,
    ecg: tuple[int, int, int, int],
    box: tuple[int, int, int, int],
) -> None:
    """The ECG that sweeps along the bottom, its cursor, and the heart rate."""
    x0, y0, x1, y1 = ecg
    steps = np.arange(x0, x1)
    now = x0 + (frame / fps * 0.25 * (x1 - x0)) % (x1 - x0)
    phase = ((steps - now) / (x1 - x0) * 4 * rate / 60) % 1
    wave = np.exp(-(((phase - 0.4) / 0.012) ** 2)) - 0.2 * np.exp(-(((phase - 0.43) / 0.01) ** 2))
    wave += 0.2 * np.exp(-(((phase - 0.65) / 0.05) ** 2))
    y = y1 - 3 - (y1 - y0 - 6) * np.clip(wave + 0.2, 0, 1.2) / 1.2
    draw.line(list(zip(steps.tolist(), y.tolist(), strict=True)), "#2ecc71", 2)
    draw.line((now, y0, now, y1), "#2ecc71", 3)
    size = max((y1 - y0) // 3, 9)
    draw.text((box[0], box[3] - 2 * size), f"{rate + frame % 3:.0f} bpm", "#2ecc71", _font(size))
