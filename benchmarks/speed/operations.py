"""How many operations of matrix products the pretraining step needs, part by part, from shapes.

A multiplication and an addition count as two. Counted are the products that the method asks for:
forward, and in backward once for each operand that needs a gradient. Nothing counts twice: no
attention weights computed again in backward, no masked token, one image teacher; and after the last
block's keys and values, no token that nothing reads.

No measurement is used here. :func:`counted` is what torch counts in a real step, to compare.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

from discovr_monai.networks.discovr import Discovr
from discovr_monai.networks.heads import Decoder, ProjectionHead
from discovr_monai.networks.vit import VisionTransformer


def product(rows: int, inner: int, columns: int, *, gradients: int) -> float:
    """(rows, inner) x (inner, columns), and the gradients of so many of the two."""
    return 2.0 * rows * inner * columns * (1 + gradients)


def attention(asking: int, tokens: int, width: int, *, train: bool) -> float:
    """softmax(q k^T) v of all heads, together ``width`` wide: 2 products forward, 4 backward.

    Args:
        asking: tokens that have a query, of all sequences.
        tokens: keys and values that each of these sees.
        width: of all heads together.
        train: whether gradients are needed.
    """
    return 4.0 * asking * tokens * width * (3 if train else 1)


def blocks(stack: Any, sequences: int, tokens: int, *, train: bool, cls_only: int = 0) -> float:
    """A stack of transformer blocks, the last of which gives CLS alone for some sequences."""
    rows, gradients, total = sequences * tokens, 2 * train, 0.0
    for number, block in enumerate(stack, start=1):
        asking = rows - (cls_only * (tokens - 1) if number == len(stack) else 0)
        width, hidden = block.mlp.fc1.in_features, block.mlp.fc1.out_features
        for count, inner, columns in (
            (asking, width, width), (rows, width, 2 * width),  # q; k and v
            (asking, width, width), (asking, width, hidden), (asking, hidden, width),
        ):  # fmt: skip
            total += product(count, inner, columns, gradients=gradients)
        total += attention(asking, tokens, width, train=train)
    return total


def encoder(
    vit: VisionTransformer, sequences: int, visible: int, *, train: bool, cls_only: int = 0
) -> float:
    """``sequences`` of CLS and ``visible`` tokens; only those are embedded."""
    pixels = vit.patch_embed.in_features
    embed = product(sequences * visible, pixels, vit.embed_dim, gradients=int(train))
    return embed + blocks(vit.blocks, sequences, 1 + visible, train=train, cls_only=cls_only)


def decoder(part: Decoder, clips: int, visible: int, tokens: int) -> float:
    """The decoder on one view of each clip, with gradients."""
    width = part.head.in_features
    embed = product(clips * visible, part.embed.in_features, width, gradients=2)
    head = product(clips * tokens, width, part.head.out_features, gradients=2)
    return embed + blocks(part.blocks, clips, tokens, train=True) + head


def head(part: ProjectionHead, rows: int, *, train: bool) -> float:
    """A projection head on so many CLS tokens."""
    layers = [(x.in_features, x.out_features) for x in part.mlp if isinstance(x, torch.nn.Linear)]
    outputs, width = part.last_layer.weight_v.shape
    layers.append((width, outputs))
    return sum(product(rows, *layer, gradients=2 * train) for layer in layers)


def step(
    network: Discovr,
    clips: int,
    views: int,
    ratio: float,
    iterations: int,
    *,
    teacher_tokens: int | None = None,
) -> dict[str, float]:
    """Every part of a step of the whole method that has matrix products.

    Args:
        network: with all three branches, clustering against the image branch.
        clips: B.
        views: V, masked views for self-distillation.
        ratio: masked share.
        iterations: Sinkhorn's.
        teacher_tokens: of a clip, that the video teacher sees; None for all.
    """
    video_branch, image_branch = network.video, network.image
    assert image_branch is not None and image_branch.head is not None
    assert video_branch.decoder is not None and video_branch.prototypes is not None
    assert video_branch.head is not None
    video, image = video_branch.student, image_branch.student
    t, h, w = video.grid
    places = h * w - int(ratio * h * w)  # visible, of a frame
    students = clips * len(image_branch.student_frames)
    teachers = clips * len(image_branch.teacher_frames)
    cls_frames = teachers - clips * len(image_branch.target_frames)
    prototypes, width = video_branch.prototypes.shape
    tokens = clips * video.num_tokens
    seen = video.num_tokens if teacher_tokens is None else teacher_tokens
    return {
        "image teacher": encoder(image, teachers, h * w, train=False, cls_only=cls_frames),
        "image students": encoder(
            image, views * students, places, train=True, cls_only=views * students
        ),
        "video teacher": encoder(video, clips, seen, train=False, cls_only=clips),
        "video students": encoder(
            video, (views + 1) * clips, t * places, train=True, cls_only=views * clips
        ),
        "decoder": decoder(video_branch.decoder, clips, t * places, video.num_tokens),
        "heads": head(video_branch.head, views * clips, train=True)
        + head(video_branch.head, clips, train=False)
        + head(image_branch.head, views * students, train=True)
        + head(image_branch.head, students, train=False),
        "prototypes": product(tokens, width, prototypes, gradients=2)
        + product(tokens, width, prototypes, gradients=1),  # z_i takes no gradient
        "Sinkhorn": 2 * 4.0 * tokens * prototypes * iterations,  # both sides
    }


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
