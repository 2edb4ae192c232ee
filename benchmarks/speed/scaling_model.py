"""A training step on many GPUs, from shapes and stated speeds: exchanges, waiting, memory.

Nothing is measured here. Exchanges are those of the trainer's own step
(tests/distributed/test_scaling.py counts them in it), sizes those of the networks that the configs
build, operations those of operations.py. Speeds are stated in FABRICS and above it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import operations
import torch
from monai.bundle import ConfigParser
from step_setup import CONFIGS
from torch import nn

from discovr_monai.configuration import MOVED
from discovr_monai.networks.discovr import Discovr
from discovr_monai.networks.vit import Block

SIZES: dict[str, tuple[str, dict[str, int]]] = {  # the config, and what is changed in it
    "ViT-S": ("small", {}),
    "ViT-B": ("paper", {}),
    "ViT-L": (
        "paper",
        {"embed_dim": 1024, "depth": 24, "num_heads": 16, "decoder_dim": 512, "decoder_heads": 8},
    ),
    "ViT-H": (
        "paper",
        {"embed_dim": 1280, "depth": 32, "num_heads": 16, "decoder_dim": 640, "decoder_heads": 10},
    ),
}
FLOAT = 4  # bytes of a parameter, a gradient, a moment, a number that is reduced
NODE = 8  # GPUs
BUCKET = 25 * 2**20  # bytes of gradients that DDP sends at a time
LAUNCH = 10e-6  # seconds to start any collective
REACHED = 0.8  # share of a link's bandwidth


@dataclass(frozen=True)
class Fabric:
    """What joins the GPUs.

    Attributes:
        name: for the tables.
        inside: B/s out of a GPU within its node.
        between: B/s out of a node, all its cards together.
        inside_hop, between_hop: seconds from one GPU to the next, from one node to the next.
    """

    name: str
    inside: float
    between: float
    inside_hop: float
    between_hop: float

    def latency(self, gpus: int) -> float:
        """Seconds of an all-reduce of next to nothing: up a binary tree and down again."""
        if gpus == 1:
            return 0.0
        nodes = math.ceil(gpus / NODE)
        inside = math.ceil(math.log2(min(gpus, NODE))) * self.inside_hop
        return LAUNCH + 2 * (inside + math.ceil(math.log2(nodes)) * self.between_hop)

    def bandwidth(self, gpus: int) -> float:
        """B/s of a ring; it enters and leaves each node over all the node's cards."""
        slowest = self.inside if gpus <= NODE else min(self.inside, self.between)
        return REACHED * slowest

    def seconds(self, size: float, gpus: int) -> float:
        """An all-reduce of ``size`` bytes."""
        if gpus == 1:
            return 0.0
        return self.latency(gpus) + ring(size, gpus) / self.bandwidth(gpus)


FABRICS = (
    Fabric("InfiniBand", inside=450e9, between=NODE * 50e9, inside_hop=1e-6, between_hop=5e-6),
    Fabric("Ethernet", inside=450e9, between=25e9 / 8, inside_hop=1e-6, between_hop=30e-6),
)


@dataclass(frozen=True)
class Collective:
    """Calls of one kind in a step.

    Attributes:
        name: what is exchanged.
        calls: how many, one after another.
        size: bytes of each.
        hidden: whether backward goes on meanwhile.
        once: in an optimiser step, however many batches are accumulated.
    """

    name: str
    calls: int
    size: int
    hidden: bool = False
    once: bool = False

    def seconds(self, fabric: Fabric, gpus: int) -> float:
        """All calls, nothing hidden."""
        return self.calls * fabric.seconds(self.size, gpus)


@dataclass(frozen=True)
class Compute:
    """Seconds of a step on one GPU: all of it, its backward, its forward (validation's too)."""

    step: float
    backward: float

    @property
    def forward(self) -> float:
        """Students and teachers."""
        return self.step - self.backward


def ring(size: float, gpus: int) -> float:
    """Bytes that leave each GPU in a ring's all-reduce."""
    return 2 * (gpus - 1) / gpus * size


def configuration(size: str, **settings: Any) -> ConfigParser:
    """The bundle's configs of a size of SIZES, with other settings on top."""
    overlay, changed = SIZES[size]
    parser = ConfigParser()
    parser.read_config([str(CONFIGS / "train.yaml"), str(CONFIGS / f"{overlay}.yaml")])
    for key, value in (changed | settings).items():
        parser[MOVED.get(key, key)] = value
    return parser


def shapes(parser: ConfigParser) -> Discovr:
    """The config's network without memory for its numbers."""
    with torch.device("meta"):
        return parser.get_parsed_content("network_def")


def trained(network: nn.Module) -> int:
    """Parameters that learn."""
    return sum(p.numel() for p in network.parameters() if p.requires_grad)


def collectives(parser: ConfigParser, network: Discovr) -> list[Collective]:
    """Every exchange of one step, in its order."""
    heads = [b.head for b in (network.video, network.image) if b is not None and b.head is not None]
    in_backward = []
    if parser["video_head_def#norm"] == "batch":
        # mean, then variance; the students' have a gradient, the teachers' have none
        moment = FLOAT * network.video.student.embed_dim
        in_backward.append(Collective("moments of the heads' batch norm", 6 * len(heads), moment))
    sinkhorns = [(2, parser["num_prototypes"], parser["loss#terms#cluster#iterations"])]
    if parser["loss#terms#video#centring"] == "sinkhorn":
        sinkhorns.append((len(heads), parser["video_head_def#out_dim"], 3))
    for times, columns, iterations in sinkhorns:
        in_backward.append(Collective("Sinkhorn: largest score, tokens", 2 * times, FLOAT))
        in_backward.append(Collective("Sinkhorn: mass", times * iterations, FLOAT * columns))
    calls = math.ceil(FLOAT * trained(network) / BUCKET)
    size = FLOAT * trained(network) // calls
    losses = sum(bool(w) for w in parser["weights"].values())
    return [
        *in_backward,
        Collective("gradients (DDP's buckets)", calls, size, hidden=True, once=True),
        # of batches accumulated before the last: the losses alone
        Collective("losses and gradient norm", 1, FLOAT * (2 + losses)),
        Collective("centres", len(heads), FLOAT * parser["video_head_def#out_dim"], once=True),
        Collective("was a rank told to stop?", 1, FLOAT, once=True),
    ]


def compute(parser: ConfigParser, network: Discovr, batch: int, speed: float) -> Compute:
    """A step of ``batch`` clips at ``speed`` operations/s, in bf16.

    Teachers have no backward; of the rest two thirds are backward.
    """
    parts = operations.step(
        network, batch, parser["num_views"], parser["mask_ratio"],
        parser["loss#terms#cluster#iterations"],
    )  # fmt: skip
    everything = sum(parts.values())
    teachers = parts["video teacher"] + parts["image teacher"]
    return Compute(everything / speed, 2 / 3 * (everything - teachers) / speed)


def waiting(
    all_of: list[Collective], work: Compute, fabric: Fabric, gpus: int, batches: int = 1
) -> dict[str, float]:
    """Seconds of a step of so many batches that each kind of exchange adds to the computation.

    Gradients travel while the last backward goes on; what is longer than it stays, and at least
    the last bucket, which is full when backward ends.
    """
    waits: dict[str, float] = {}
    for one in all_of:
        seconds = one.seconds(fabric, gpus) * (1 if one.once else batches)
        if one.hidden:
            last = fabric.seconds(min(one.size, BUCKET), gpus)
            seconds = max(seconds - work.backward, last)
        waits[one.name] = waits.get(one.name, 0.0) + seconds
    return waits


def efficiency(
    all_of: list[Collective], work: Compute, fabric: Fabric, gpus: int, batches: int = 1
) -> float:
    """Share of the GPUs' time that computes; 1 on one GPU."""
    lost = sum(waiting(all_of, work, fabric, gpus, batches).values())
    return batches * work.step / (batches * work.step + lost)


@dataclass(frozen=True)
class Memory:
    """Bytes on each GPU of what a step keeps, without activations."""

    parameters: float
    teachers: float
    gradients: float
    moments: float
    whole: float = 0.0  # what shards are brought together for

    @property
    def total(self) -> float:
        """All of it."""
        return self.parameters + self.teachers + self.gradients + self.moments + self.whole


def memory(network: Discovr, gpus: int, *, sharded: bool) -> Memory:
    """With everything on each GPU, or in shards over all of them.

    Shards come together a block at a time, with the next one on its way; what is in no block
    (heads, prototypes, embeddings) stays whole from forward to backward, with its gradients.
    """
    learn = FLOAT * trained(network)
    teachers = FLOAT * sum(p.numel() for p in network.parameters()) - learn
    if not sharded:
        return Memory(learn, teachers, learn, 2 * learn)
    blocks = [m for m in network.modules() if isinstance(m, Block)]
    inside = {id(p) for block in blocks for p in block.parameters()}
    outside = [p for p in network.parameters() if id(p) not in inside]
    apart = FLOAT * sum(p.numel() * (1 + p.requires_grad) for p in outside)
    pair = 2 * FLOAT * max(sum(p.numel() for p in block.parameters()) for block in blocks)
    own, averaged = learn / gpus, teachers / gpus
    return Memory(own, averaged, own, 2 * own, apart + pair)
