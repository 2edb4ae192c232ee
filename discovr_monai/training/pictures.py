"""Pictures of what the network sees: prototype maps, PCA of patch tokens, usage."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from discovr_monai.networks.discovr import Discovr


def pca_colours(tokens: Tensor) -> np.ndarray:
    """First three principal components of tokens as colours.

    Args:
        tokens: (N, d).

    Returns:
        (N, 3) float in 0..1, each component stretched between its 2nd and 98th percentile.
    """
    x = tokens.double() - tokens.double().mean(0)
    _, _, directions = torch.linalg.svd(x, full_matrices=False)
    directions = directions[:3]
    sign = directions.gather(1, directions.abs().argmax(1, keepdim=True)).sign()
    components = (x @ (directions * sign).T).numpy()  # (N, <= 3)
    components = np.pad(components, ((0, 0), (0, 3 - components.shape[1])))
    low, high = np.percentile(components, [2, 98], axis=0)
    return np.clip((components - low) / np.maximum(high - low, 1e-9), 0, 1)


def token_maps(
    values: np.ndarray, grid: tuple[int, int, int], frames: int, side: int
) -> np.ndarray:
    """Token values (N, C) to pixels (frames, side, side, C), nearest neighbour."""
    t, h, w = grid
    maps = values.reshape(t, h, w, -1)
    maps = maps.repeat(frames // t, 0)
    rows, columns = np.arange(side) * h // side, np.arange(side) * w // side
    return maps[:, rows][:, :, columns]


def blend(frames: np.ndarray, colours: np.ndarray, opacity: float = 0.5) -> np.ndarray:
    """Grey frames (T, H, W) 0..255 under colours (T, H, W, 3) 0..1 -> uint8 RGB."""
    grey = frames[..., None].astype(np.float32)
    return (grey * (1 - opacity) + 255 * colours * opacity).round().astype(np.uint8)


def save_animation(path: Path, frames: np.ndarray, fps: float = 12.0, zoom: int = 1) -> None:
    """Writes (T, H, W, 3) uint8 as a looping GIF, each pixel as zoom x zoom."""
    from PIL import Image

    size = (frames.shape[2] * zoom, frames.shape[1] * zoom)
    # a frame's palette is the same before and after zooming, and much cheaper to find before
    images = [Image.fromarray(f).quantize().resize(size, Image.Resampling.NEAREST) for f in frames]
    images[0].save(
        path, save_all=True, append_images=images[1:], duration=round(1000 / fps), loop=0
    )


@torch.no_grad()
def draw_network(
    network: Discovr, clip: Tensor, grey: np.ndarray, folder: Path, name: str
) -> list[Path]:
    """Pictures of one clip.

    Args:
        network: in any mode; it is used as it is, without gradient.
        clip: (1, 3, T, H, W) normalised, on the network's device.
        grey: (T, H, W) uint8, the same clip.
        folder: where to write.
        name: prefix of the files.

    Returns:
        The files: an animation of the PCA of the video teacher's patch tokens over the cine,
        and, with prototypes, a map of each place's nearest prototype and their usage.
    """
    folder.mkdir(parents=True, exist_ok=True)
    grid, frames, side = network.video.student.grid, *network.video.student.clip_shape[1:3]
    tokens = network.video.teacher(clip)[0, 1:].float().cpu()  # (N, d)
    colours = token_maps(pca_colours(tokens), grid, frames, side)
    files = [folder / f"{name}_pca.gif"]
    pair = np.concatenate((grey[..., None].repeat(3, -1), blend(grey, colours)), axis=2)
    save_animation(files[0], pair, zoom=3)
    if network.image is not None and network.image.target_frames:
        assert network.video.prototypes is not None
        nearest, count = cluster_map(network, clip)[0].cpu(), len(network.video.prototypes)
        files.append(_prototype_figure(nearest, grey, grid, count, folder, name))
    return files


def cluster_map(network: Discovr, clip: Tensor) -> Tensor:
    """Nearest prototype of each place's target token: (B, 3, T, H, W) -> (B, N) int64."""
    assert network.image is not None and network.video.prototypes is not None
    target = network.image.target_tokens(clip)  # (B, N, d)
    unit = torch.nn.functional.normalize(network.video.prototypes, dim=-1)
    return (torch.nn.functional.normalize(target, dim=-1) @ unit.T).argmax(-1)


def palette(count: int) -> np.ndarray:
    """(count, 3) colours, the same for the same count."""
    from matplotlib import colormaps

    order = np.random.default_rng(0).permutation(count)
    return colormaps["gist_ncar"](order / count)[:, :3]


def _prototype_figure(
    nearest: Tensor,
    grey: np.ndarray,
    grid: tuple[int, int, int],
    count: int,
    folder: Path,
    name: str,
) -> Path:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    frames, side = grey.shape[0], grey.shape[1]
    maps = token_maps(palette(count)[nearest.numpy()], grid, frames, side)
    shown = [0, frames // 3, 2 * frames // 3]
    figure, axes = plt.subplots(2, 4, figsize=(12, 6), layout="constrained")
    for column, frame in enumerate(shown):
        for row, picture in enumerate((grey, blend(grey, maps))):
            axes[row, column].imshow(picture[frame], cmap="gray", vmin=0, vmax=255)
            axes[row, column].set_axis_off()
        axes[0, column].set_title(f"frame {frame}")
    usage = np.sort(np.bincount(nearest.numpy(), minlength=count))[::-1]
    axes[0, 3].stairs(usage, fill=True)  # one shape: a bar each would take seconds
    axes[0, 3].set(title="prototype usage, this clip", xlabel="prototype, sorted", ylabel="tokens")
    axes[1, 3].text(
        0.02,
        0.6,
        f"{(usage > 0).sum()} of {count} prototypes used\ncolour = nearest prototype\n"
        "of each place's image-teacher token",
        fontsize=10,
    )
    axes[1, 3].set_axis_off()
    path = folder / f"{name}_prototypes.png"
    figure.savefig(path, dpi=80)
    plt.close(figure)
    return path


class NetworkPictures:
    """Draws one fixed clip at an epoch; for :class:`training.handlers.Pictures`.

    Args:
        dataset: its first item is drawn ((C, T, H, W) uint8 under "image").
        prepare_batch: as the trainer's.
        folder: where to write.
    """

    def __init__(self, dataset: Any, prepare_batch: Any, folder: str | Path) -> None:
        self.dataset, self.prepare_batch, self.folder = dataset, prepare_batch, Path(folder)

    def __call__(self, trainer: Any, epoch: int) -> list[Path]:
        image = torch.as_tensor(self.dataset[(0, 0)]["image"])
        clip = self.prepare_batch({"image": image[None]}, trainer.state.device, False)
        grey = image.float().mean(0).round().byte().numpy()  # (T, H, W)
        return draw_network(trainer.network, clip, grey, self.folder, f"epoch_{epoch:04d}")
