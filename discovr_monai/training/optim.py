"""Parameter groups, and moving clips to the device."""

from __future__ import annotations

from typing import Any

from torch import nn


def parameter_groups(network: nn.Module, weight_decay: float = 0.05) -> list[dict[str, Any]]:
    """Trainable parameters in two groups: decayed matrices, and the rest without decay.

    Biases, norms, CLS and mask tokens and the unit-norm prototypes are not decayed (paper,
    appendix A). Both ask for torch's fused update, which reads and writes each tensor once.
    """
    decayed: list[nn.Parameter] = []
    free: list[nn.Parameter] = []
    for name, parameter in network.named_parameters():
        if not parameter.requires_grad:
            continue
        is_token = name.endswith(("cls_token", "mask_token", "prototypes"))
        (free if parameter.dim() < 2 or is_token else decayed).append(parameter)
    return [
        {"params": decayed, "weight_decay": weight_decay, "fused": True},
        {"params": free, "weight_decay": 0.0, "fused": True},
    ]
