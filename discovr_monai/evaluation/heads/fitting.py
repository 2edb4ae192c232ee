"""The supervised loop of heads and of fine-tuning: MONAI's trainer, the best epoch kept."""

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
    """Freezes an encoder but for its last blocks and final norm, and gives their groups.

    Args:
        encoder: changed in place.
        count: blocks to train, 0 for none (then the norm stays frozen too).
        layer_decay: each block's lr is that of the one after it times this.
        weight_decay: of matrices only.

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
    if not count:
        return groups
    layers = [encoder.norm, *list(encoder.blocks)[::-1][:count]]
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

    Args:
        network: on the device; its own ``train`` says what stays in evaluation.
        groups: parameters with "lr_scale".
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
    schedule = WarmupCosine(
        peak=lr, total=epochs * len(loader), warmup=int(warmup_epochs * len(loader))
    )
    trainer = SupervisedTrainer(
        device=torch.device(device),
        max_epochs=epochs,
        train_data_loader=loader,
        network=network,
        optimizer=optimizer,
        loss_function=loss,
        prepare_batch=prepare,
        decollate=False,
    )
    best: dict[str, Any] = {"figure": math.inf, "state": copy.deepcopy(network.state_dict())}
    bar = tqdm(total=epochs, desc=progress, unit="epoch", disable=progress is None)

    def set_lr(engine: Engine) -> None:
        value = schedule(engine.state.iteration - 1)
        for group in optimizer.param_groups:
            group["lr"] = value * group["lr_scale"]

    def keep_best(_: Engine) -> None:
        network.eval()
        with torch.no_grad():
            figure = validate()
        if figure < best["figure"]:
            best.update(figure=figure, state=copy.deepcopy(network.state_dict()))
        bar.set_postfix(validation=f"{figure:.3f}", best=f"{best['figure']:.3f}")
        bar.update()

    trainer.add_event_handler(Events.ITERATION_STARTED, set_lr)
    trainer.add_event_handler(Events.EPOCH_COMPLETED, keep_best)
    trainer.logger.setLevel("ERROR")
    trainer.run()
    bar.close()
    if not math.isfinite(best["figure"]):
        raise ValueError(f"the training diverged: no epoch's loss was a number. Lower lr ({lr:g})")
    network.load_state_dict(best["state"])
    network.eval()
    return float(best["figure"])
