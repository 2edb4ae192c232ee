"""How much arithmetic and memory traffic the pretraining step needs, part by part, from shapes.

Matrix operations are those of the products that the method asks for (2 for a multiplication and
an addition): forward, and in backward once for each operand that needs a gradient. Nothing is
counted twice: no attention weights computed again in backward, no masked token, one image
teacher; after the last block's keys and values, no token that nothing reads. Other operations
(norms, GELU, softmax, optimiser) are counted roughly, by element.

Bytes are the least that must cross memory: each product reads its operands and writes its result
once, weights and their gradients in fp32, activations in the precision's own size; attention's
weights never leave the cache, and what acts on single elements rides on the product beside it.
The terms over all logits or scores, Sinkhorn, the optimiser and the averages are counted by the
passes that they cannot do without.

No measurement is used here; :func:`counted` is what torch counts in the real step, to compare.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

from discovr_monai.networks.discovr import Discovr
from discovr_monai.networks.heads import Decoder, ProjectionHead
from discovr_monai.networks.vit import VisionTransformer

MASTER = 4  # bytes of a weight, a gradient, a moment
NORM, GELU, SOFTMAX = 8, 10, 5  # rough operations per element, forward; backward as many again
ADAMW, GRADIENT_NORM, EMA = 14, 2, 3  # per parameter


@dataclass(frozen=True)
class Count:
    """What a part needs.

    Attributes:
        matrix: floating-point operations of matrix products.
        other: other floating-point operations, roughly.
        bytes: memory traffic.
    """

    matrix: float = 0.0
    other: float = 0.0
    bytes: float = 0.0

    def __add__(self, more: Count) -> Count:
        return Count(self.matrix + more.matrix, self.other + more.other, self.bytes + more.bytes)

    def __mul__(self, times: float) -> Count:
        return Count(self.matrix * times, self.other * times, self.bytes * times)

    def seconds(self, peak: float, bandwidth: float) -> float:
        """The floor: products at the peak (operations/s), or traffic at full bandwidth (B/s)."""
        return max(self.matrix / peak, self.bytes / bandwidth)


def product(rows: int, inner: int, columns: int, *, element: int, gradients: int) -> Count:
    """(rows, inner) x (inner, columns) weights, and the gradients of so many of the two."""
    passes = 1 + gradients
    traffic = (rows * inner + rows * columns) * element + inner * columns * MASTER
    return Count(matrix=2.0 * rows * inner * columns * passes, bytes=traffic * passes)


def attention(
    rows: int, asking: int, tokens: int, width: int, *, element: int, train: bool
) -> Count:
    """softmax(q k^T) v of all heads: 2 products forward, 4 backward; ``width`` of all heads.

    Args:
        rows: of keys and values, of all sequences.
        asking: rows that have a query.
        tokens: that each of these sees.
    """
    weights = asking * tokens
    traffic = 2.0 * (rows + asking) * width * element  # k, v; q, out; and the gradients of each
    forward = Count(4.0 * weights * width, SOFTMAX * weights, traffic)
    return forward + Count(8.0 * weights * width, 2 * SOFTMAX * weights, 2 * traffic) * train


def blocks(
    stack: Any, sequences: int, tokens: int, *, element: int, train: bool, cls_only: int = 0
) -> Count:
    """A stack of transformer blocks, the last of which gives CLS alone for some sequences."""
    rows, gradients = sequences * tokens, 2 * train
    total = Count()
    for number, block in enumerate(stack, start=1):
        asking = rows - (cls_only * (tokens - 1) if number == len(stack) else 0)
        width, hidden = block.mlp.fc1.in_features, block.mlp.fc1.out_features
        first = [(rows, width, 3 * width)]
        if asking != rows:
            first = [(asking, width, width), (rows, width, 2 * width)]
        for count, inner, columns in (
            *first, (asking, width, width), (asking, width, hidden), (asking, hidden, width),
        ):  # fmt: skip
            total += product(count, inner, columns, element=element, gradients=gradients)
        total += attention(rows, asking, tokens, width, element=element, train=train)
        each = (NORM + 2) * width + GELU * hidden  # a norm, two residuals; the first norm is of all
        total += Count(other=float((asking * each + rows * NORM * width) * (1 + train)))
    return total


def encoder(
    vit: VisionTransformer,
    sequences: int,
    visible: int,
    *,
    element: int,
    train: bool,
    cls_only: int = 0,
) -> Count:
    """``sequences`` of CLS and ``visible`` tokens; only those are embedded."""
    pixels, width, tokens = vit.patch_embed.in_features, vit.embed_dim, 1 + visible
    embed = product(sequences * visible, pixels, width, element=element, gradients=int(train))
    last = (sequences - cls_only) * tokens + cls_only
    norm = Count(other=float(last * NORM * width * (1 + train)))
    body = blocks(vit.blocks, sequences, tokens, element=element, train=train, cls_only=cls_only)
    return embed + body + norm


def decoder(part: Decoder, clips: int, visible: int, tokens: int, *, element: int) -> Count:
    """The decoder on one view of each clip, with gradients."""
    width, rows = part.head.in_features, clips * tokens
    embed = product(clips * visible, part.embed.in_features, width, element=element, gradients=2)
    head = product(rows, width, part.head.out_features, element=element, gradients=2)
    norm = Count(other=float(rows * NORM * width * 2))
    return embed + blocks(part.blocks, clips, tokens, element=element, train=True) + head + norm


def head(part: ProjectionHead, rows: int, *, element: int, train: bool) -> Count:
    """A projection head on so many CLS tokens."""
    total, gradients = Count(), 2 * train
    for layer in part.mlp:
        if isinstance(layer, torch.nn.Linear):
            shape = (rows, layer.in_features, layer.out_features)
            total += product(*shape, element=element, gradients=gradients)
            total += Count(other=float(rows * GELU * layer.out_features * (1 + train)))
    outputs, width = part.last_layer.weight_v.shape
    total += product(rows, width, outputs, element=element, gradients=gradients)
    return total + Count(other=float(4 * outputs * width * (1 + train)))


def _logits(students: int, teachers: int, outputs: int, element: int) -> Count:
    """Self-distillation: student logits in, their gradient out; teacher logits in."""
    passes = (3 * students + teachers) * outputs  # forward read; backward read, write
    other = SOFTMAX * (2 * students + teachers) * outputs
    return Count(other=float(other), bytes=float(passes * element))


def _sinkhorn(rows: int, prototypes: int, iterations: int, element: int) -> Count:
    """Both sides. exp once, then a pass over the matrix an iteration, then the result."""
    entries = rows * prototypes
    side = Count(
        matrix=4.0 * entries * iterations,
        other=float(SOFTMAX * entries),
        bytes=float(entries * (element + MASTER * (1 + iterations + 2))),
    )
    return side * 2


def _clusters(rows: int, prototypes: int, element: int) -> Count:
    """Cross-entropies of both sides: scores and assignments in, gradients out."""
    entries = 2 * rows * prototypes
    read_twice = 2 * (element + MASTER)  # scores and assignments, forward and backward
    return Count(other=float(3 * SOFTMAX * entries), bytes=float(entries * (read_twice + element)))


def step(
    network: Discovr,
    clips: int,
    views: int,
    ratio: float,
    iterations: int,
    *,
    element: int,
    teacher_tokens: int | None = None,
) -> dict[str, Count]:
    """Every part of a step of the whole method.

    Args:
        network: with all three branches, clustering against the image branch.
        clips: B.
        views: V, masked views for self-distillation.
        ratio: masked share.
        iterations: Sinkhorn's.
        element: bytes of an activation: 4 in fp32, 2 in bf16.
        teacher_tokens: of a clip, that the video teacher sees; None for all.
    """
    video, image = network.video_student, network.image_student
    assert image is not None and network.decoder is not None and network.prototypes is not None
    assert network.video_head is not None and network.image_head is not None
    t, h, w = video.grid
    places = h * w - int(ratio * h * w)  # visible, of a frame
    students, teachers = clips * len(network.student_frames), clips * len(network.teacher_frames)
    cls_frames = teachers - clips * len(network.target_frames)
    prototypes, width = network.prototypes.shape
    tokens, outputs = clips * video.num_tokens, network.video_head.last_layer.weight_v.shape[0]
    image_outputs = network.image_head.last_layer.weight_v.shape[0]
    trained = sum(p.numel() for p in network.parameters() if p.requires_grad)
    copied = (video, image, network.video_head, network.image_head)
    averaged = sum(p.numel() for part in copied for p in part.parameters())
    frames, side = video.clip_shape[1:3]
    pixels = clips * frames * side * side
    e, seen = element, video.num_tokens if teacher_tokens is None else teacher_tokens
    return {
        "data": Count(other=9.0 * pixels, bytes=float(pixels * (1 + 3 * MASTER))),
        "image teacher": encoder(
            image, teachers, h * w, element=e, train=False, cls_only=cls_frames
        ),
        "image students": encoder(
            image, views * students, places, element=e, train=True, cls_only=views * students
        ),
        "video teacher": encoder(video, clips, seen, element=e, train=False, cls_only=clips),
        "video students": encoder(
            video, (views + 1) * clips, t * places, element=e, train=True, cls_only=views * clips
        ),
        "decoder": decoder(network.decoder, clips, t * places, video.num_tokens, element=e),
        "heads": head(network.video_head, views * clips, element=e, train=True)
        + head(network.video_head, clips, element=e, train=False)
        + head(network.image_head, views * students, element=e, train=True)
        + head(network.image_head, students, element=e, train=False),
        "prototypes": product(tokens, width, prototypes, element=e, gradients=2)
        + product(tokens, width, prototypes, element=e, gradients=1),  # z_i takes no gradient
        "Sinkhorn": _sinkhorn(tokens, prototypes, iterations, e),
        "losses": _logits(views * clips, clips, outputs, e)
        + _logits(views * students, students, image_outputs, e)
        + _clusters(tokens, prototypes, e),
        "optimiser": Count(
            other=float((ADAMW + GRADIENT_NORM) * trained), bytes=8.0 * MASTER * trained
        ),  # the norm reads g; the step reads p, g, m, v and writes p, m, v
        "EMA": Count(other=float(EMA * averaged), bytes=3.0 * MASTER * averaged),
    }


def total(parts: dict[str, Count]) -> Count:
    """The whole step."""
    return sum(parts.values(), Count())


def _attention_forward(query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
    return sdpa_flop_count(query, key, value)


def _attention_backward(_: Any, query: Any, key: Any, value: Any, *__: Any, **___: Any) -> int:
    return 2 * sdpa_flop_count(query, key, value)  # what recomputes the weights is not needed


def _linear(x: Any, *inputs: Any, **__: Any) -> int:
    weight = next(shape for shape in inputs[::-1] if len(shape or ()) == 2)  # (out, d)
    return 2 * math.prod(x) * weight[0]


_NAMES = (
    "_scaled_dot_product_flash_attention",
    "_scaled_dot_product_efficient_attention",
    "_scaled_dot_product_cudnn_attention",
    "_scaled_dot_product_flash_attention_for_cpu",
)  # torch itself has no formula for the CPU's


def counted(run: Callable[[], object]) -> float:
    """Operations of matrix products that torch's counter sees while ``run`` runs."""
    formulas: dict[Any, Callable[..., int]] = {}
    for name in _NAMES:
        formulas[getattr(torch.ops.aten, name)] = _attention_forward
        formulas[getattr(torch.ops.aten, f"{name}_backward")] = _attention_backward
    if torch.backends.mkldnn.is_available():
        formulas[torch.ops.mkldnn._linear_pointwise] = _linear
    with FlopCounterMode(display=False, custom_mapping=formulas) as counter:
        run()
    return float(counter.get_total_flops())
