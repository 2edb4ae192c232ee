"""Parameter groups of the optimiser."""

from __future__ import annotations

from typing import Any

from torch import nn


def parameter_groups(network: nn.Module, weight_decay: float = 0.05) -> list[dict[str, Any]]:
    """Trainable parameters in two groups: decayed matrices, and the rest without decay.

    Biases, norms, CLS and mask tokens and the unit-norm prototypes are not decayed (paper,
    appendix A). Both ask for torch's fused update, which reads and writes each tensor once. Their
    order is that of the state dict: an optimiser's saved state knows parameters by it.
    """
    decayed: list[nn.Parameter] = []
    free: list[nn.Parameter] = []
    for name, parameter in network.state_dict(keep_vars=True).items():
        if not isinstance(parameter, nn.Parameter) or not parameter.requires_grad:
            continue
        is_token = name.endswith(("cls_token", "mask_token", "prototypes"))
        (free if parameter.dim() < 2 or is_token else decayed).append(parameter)
    return [
        {"params": decayed, "weight_decay": weight_decay, "fused": True},
        {"params": free, "weight_decay": 0.0, "fused": True},
    ]
