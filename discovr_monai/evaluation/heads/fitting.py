"""The supervised training of heads and of an encoder's last blocks."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from ignite.engine import Engine, Events
from monai.engines import SupervisedTrainer
from torch import nn
from tqdm import tqdm

from discovr_monai.base.schedules import WarmupCosine
from discovr_monai.networks.vit import VisionTransformer


def last_blocks(
    encoder: VisionTransformer, count: int, *, layer_decay: float, weight_decay: float
) -> list[dict[str, Any]]:
    """Freezes an encoder but for its last blocks and final norm, and groups their parameters.

    Args:
        encoder: changed in place.
        count: how many blocks are trained; with 0, the norm stays frozen too.
        layer_decay: a block's learning rate is that of the block after it times this.
        weight_decay: of matrices; vectors have none.

    Returns:
        Parameter groups with "lr_scale".

    Raises:
        ValueError: if there are fewer blocks.
    """
    if not 0 <= count <= len(encoder.blocks):
        raise ValueError(
            f"blocks {count} must lie in 0..{len(encoder.blocks)}, the encoder's depth"
        )
    encoder.requires_grad_(False)
    groups: list[dict[str, Any]] = []
    layers = [encoder.norm, *list(encoder.blocks)[::-1][:count]] if count else []
    for depth, layer in enumerate(layers):
        layer.requires_grad_(True)
        scale = layer_decay ** max(depth, 1)  # the norm moves with the last block
        groups += scaled_groups(layer, scale, weight_decay)
    return groups


def scaled_groups(module: nn.Module, scale: float, weight_decay: float) -> list[dict[str, Any]]:
    """Matrices with weight decay, the rest without, both at ``scale`` times the learning rate."""
    matrices = [p for p in module.parameters() if p.dim() > 1]
    others = [p for p in module.parameters() if p.dim() <= 1]
    return [
        {"params": params, "weight_decay": decay, "lr_scale": scale}
        for params, decay in ((matrices, weight_decay), (others, 0.0))
        if params
    ]


class _BestEpoch:
    """After each epoch, validates the network and remembers its state if that is the best."""

    def __init__(self, network: nn.Module, validate: Callable[[], float], bar: tqdm) -> None:
        self.network, self.validate, self.bar = network, validate, bar
        self.figure, self.state = math.inf, copy.deepcopy(network.state_dict())

    def __call__(self, _: Engine) -> None:
        self.network.eval()
        with torch.no_grad():
            figure = self.validate()
        if figure < self.figure:
            self.figure, self.state = figure, copy.deepcopy(self.network.state_dict())
        self.bar.set_postfix(validation=f"{figure:.3f}", best=f"{self.figure:.3f}")
        self.bar.update()


def fit(
    network: nn.Module,
    groups: Sequence[dict[str, Any]],
    loader: Any,
    *,
    prepare: Callable[..., Any],
    loss: Callable[..., Any],
    validate: Callable[[], float],
    epochs: int,
    lr: float,
    warmup_epochs: float = 0.0,
    device: torch.device | str = "cpu",
    progress: str | None = None,
) -> float:
    """Trains with AdamW and a warmed-up cosine; leaves the network at its best epoch.

    Supervised heads have this loop of their own, on MONAI's SupervisedTrainer, because the
    self-supervised pretraining's trainer has teachers and two branches that they do not need.

    Args:
        network: on the device; its own ``train`` says what stays in evaluation.
        groups: parameters with "lr_scale", see :func:`scaled_groups`.
        loader: batches.
        prepare: (batch, device, non_blocking) -> (inputs, targets).
        loss: (outputs, targets) -> scalar.
        validate: a figure after each epoch, the lower the better; the network is in evaluation.
        epochs, lr, warmup_epochs: the schedule.
        progress: label of a progress bar, None for none.

    Returns:
        The best figure.

    Raises:
        ValueError: if there is nothing to train on, or no figure is finite.
    """
    if epochs < 1 or not len(loader):
        raise ValueError(
            f"epochs {epochs} must be at least 1, and there must be a batch to train on"
        )
    optimizer = torch.optim.AdamW(list(groups), lr=lr)
    with tqdm(total=epochs, desc=progress, unit="epoch", disable=progress is None) as bar:
        best = _BestEpoch(network, validate, bar)
        trainer = SupervisedTrainer(
            torch.device(device), epochs, loader, network, optimizer, loss,
            prepare_batch=prepare, decollate=False,
        )  # fmt: skip
        steps = len(loader)
        schedule = WarmupCosine(lr, total=epochs * steps, warmup=int(warmup_epochs * steps))
        trainer.add_event_handler(Events.ITERATION_STARTED, _set_lr, optimizer, schedule)
        trainer.add_event_handler(Events.EPOCH_COMPLETED, best)
        trainer.logger.setLevel("ERROR")
        trainer.run()
    if not math.isfinite(best.figure):
        raise ValueError(f"the training diverged: no epoch's loss was a number. Lower lr ({lr:g})")
    network.load_state_dict(best.state)
    network.eval()
    return float(best.figure)


def _set_lr(engine: Engine, optimizer: torch.optim.Optimizer, schedule: WarmupCosine) -> None:
    """Each group gets the schedule's learning rate times its own "lr_scale"."""
    value = schedule(engine.state.iteration - 1)
    for group in optimizer.param_groups:
        group["lr"] = value * group["lr_scale"]
