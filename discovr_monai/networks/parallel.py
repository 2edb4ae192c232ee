"""One network on many processes: whole on each, or in shards."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from discovr_monai.networks.vit import Block

STRATEGIES = ("ddp", "fsdp")


def parallel(network: nn.Module, device: torch.device, strategy: str = "ddp") -> nn.Module:
    """A network whose gradients are means over ranks.

    Args:
        network: on ``device`` already, the same on every rank.
        device: this rank's.
        strategy: "ddp" keeps everything on every rank. "fsdp" keeps 1 / ranks of the parameters
            (the teachers' too), gradients and optimiser state on each, and brings together a
            block at a time: for networks that do not fit otherwise. Same result.

    Raises:
        ValueError: for another strategy.
    """
    if strategy == "ddp":
        return DistributedDataParallel(
            network,
            device_ids=[device] if device.type == "cuda" else None,
            forward_sync_buffers=False,  # fixed tables, and centres that all ranks move alike
            gradient_as_bucket_view=True,  # no second copy of the gradients
        )
    if strategy != "fsdp":
        raise ValueError(f"strategy {strategy!r} must be one of {', '.join(STRATEGIES)}")
    from torch.distributed.fsdp import fully_shard  # a second to import, for this alone

    for module in list(network.modules()):
        if isinstance(module, Block):
            fully_shard(module)
    fully_shard(network)
    return network


def is_sharded(network: nn.Module) -> bool:
    """Whether each rank holds a part of the network only."""
    return hasattr(network, "set_requires_gradient_sync")


def load_whole(network: nn.Module, state: dict[str, Tensor]) -> None:
    """Loads whole tensors, which every rank has, also into a sharded network."""
    own = network.state_dict()
    parts = {}
    for name, value in state.items():
        target = own.get(name)
        if (
            target is not None
            and hasattr(target, "placements")
            and not hasattr(value, "placements")
        ):
            from torch.distributed.tensor import distribute_tensor  # slow to import

            value = value.to(target.device, target.dtype)
            value = distribute_tensor(
                value, target.device_mesh, target.placements, src_data_rank=None
            )
        parts[name] = value
    network.load_state_dict(parts)
