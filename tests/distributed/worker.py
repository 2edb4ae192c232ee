"""One rank of tests/distributed/test_equality.py: trains and writes down what came out.

torchrun --nproc_per_node N -m tests.distributed.worker OUT TRAINING[:EPOCHS] ...
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from ignite.engine import Events
from torch.utils.data import DataLoader

from discovr_monai.base.distributed import rank, shut_down, start, world_size
from discovr_monai.data.clips.dataset import ClipDataset, EpochSampler
from discovr_monai.data.clips.normalise import PrepareClip
from discovr_monai.networks.discovr import Discovr
from discovr_monai.networks.heads import ProjectionHead
from discovr_monai.networks.parallel import parallel
from discovr_monai.training.checkpoint import Checkpoints
from discovr_monai.training.optim import parameter_groups
from discovr_monai.training.trainer import DiscovrTrainer
from tests.conftest import OUTPUTS, WIDTH, tiny_network
from tests.training.test_trainer import add_clip, rows, trainer

GLOBAL_BATCH = 8
TRAININGS = {
    "float64": {"dtype": torch.float64},
    "float32": {"dtype": torch.float32},
    "accumulated": {"dtype": torch.float64, "accumulation": 2},
    "batch_norm": {"dtype": torch.float64, "norm": "batch"},
    "sharded": {"dtype": torch.float64, "strategy": "fsdp"},
    "sharded_accumulated": {"dtype": torch.float64, "strategy": "fsdp", "accumulation": 2},
}


def build(
    dtype: torch.dtype,
    accumulation: int = 1,
    norm: str = "none",
    strategy: str = "ddp",
    epochs: int = 10,
) -> DiscovrTrainer:
    """A trainer of this rank's share of the global batch; 22 clips make 2 steps and a rest."""
    torch.manual_seed(0)
    heads = {f"{b}_head": ProjectionHead(WIDTH, OUTPUTS, 16, 8, norm) for b in ("video", "image")}
    network: torch.nn.Module = tiny_network(**heads).to(dtype)
    size = GLOBAL_BATCH // world_size() // accumulation
    dataset = ClipDataset(rows(22), add_clip, seed=1)
    sampler = EpochSampler(22, size, seed=1, rank=rank(), world_size=world_size())
    if world_size() > 1:
        network = parallel(network, torch.device("cpu"), strategy)
    prepare = PrepareClip()
    return trainer(
        epochs=epochs,
        network=network,
        # eps: a norm takes a gradient to 0, of which AdamW would make steps of rounding errors
        optimizer=torch.optim.AdamW(parameter_groups(network), lr=1e-3, eps=1e-6),
        train_data_loader=DataLoader(dataset, size, sampler=sampler),
        sampler=sampler,
        accumulation_steps=accumulation,
        prepare_batch=lambda *a: prepare(*a).to(dtype),
    )


def watch(engine: DiscovrTrainer, found: dict) -> None:
    """Losses of each step; all gradients of the first and the last; SCD's assignments of one."""
    network, cluster = engine.network, engine.loss_function.terms["cluster"]
    assign = cluster.assign

    def assigned(scores):
        made = assign(scores)
        if engine.state.iteration == 1:
            found["assignments"].append(made[:].clone())
        return made

    cluster.assign = assigned

    @engine.on(Events.ITERATION_COMPLETED)
    def note(engine: DiscovrTrainer) -> None:
        found["losses"].append(torch.tensor(list(engine.state.output[0].values())[:4]))
        if engine.between_steps:
            grads = {n: p.grad for n, p in network.named_parameters() if p.grad is not None}
            found["gradients"] = {n: whole(g) for n, g in grads.items()}
            found.setdefault("first_gradients", found["gradients"])


def whole(tensor: torch.Tensor) -> torch.Tensor:
    return (tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor).clone()


def main(out: Path, names: list[str]) -> None:
    """Every training of ``names`` with these ranks."""
    start()
    for name in names:
        name, _, until = name.partition(":")  # "sharded:5" stops after 5 epochs, or goes on
        engine = build(**TRAININGS[name], epochs=int(until or 10))
        found: dict = {"losses": [], "assignments": []}
        watch(engine, found)
        if until:
            Checkpoints(out / name).attach(engine)
        engine.run()
        network = engine.network
        assert isinstance(network, Discovr)
        found["state"] = {key: whole(value) for key, value in network.state_dict().items()}
        found["losses"] = torch.stack(found["losses"])
        torch.save(found, out / f"{name}-{world_size()}-{rank()}.pt")
    shut_down()


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
