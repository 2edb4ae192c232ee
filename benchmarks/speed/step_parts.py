"""The machine's peak, and the time of each part of our step by itself."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any
from unittest import mock

import torch
from step_setup import Batch, now
from torch import Tensor, nn

from discovr_monai.losses.clustering import ClusterDistillation
from discovr_monai.networks.discovr import Discovr
from discovr_monai.networks.image_branch import frames_of
from discovr_monai.networks.masking import StepMasks
from discovr_monai.training.trainer import PRECISIONS, DiscovrTrainer

Part = Callable[[], object]
GEMMS = ((2048, 2048, 2048), (4096, 4096, 4096), (6144, 768, 3072), (8192, 1024, 1024))
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def matrix_peak(precision: str, device: torch.device, *, quick: bool = False) -> float:
    """Operations/s of the best matrix product out of several sizes, the best of several tries."""
    best = 0.0
    scale = 4 if device.type == "cuda" else 1
    for m, k, n in ((256, 256, 256),) if quick else GEMMS:
        shape = (m * scale, k * scale), (k * scale, n * scale)
        a, b = (torch.randn(s, device=device).to(DTYPES[precision]) for s in shape)
        a @ b
        for _ in range(5):
            start = now(device)
            a @ b
            seconds = now(device) - start
            best = max(best, 2.0 * m * k * n * scale**3 / seconds)
    return best


def parts(trainer: DiscovrTrainer, batch: Batch) -> dict[str, Part]:
    """Part -> a call that does its forward and, where it trains, its backward.

    Each part gets the output of the part before it, so it works on the step's own shapes, types
    and values. As in the step, gradients are None before backward.
    """
    network = trainer.network
    clip, masks = _data(trainer, batch)
    dtype = PRECISIONS[trainer.precision]

    def cast() -> AbstractContextManager:
        return torch.autocast(clip.device.type, dtype=dtype, enabled=dtype is not None)

    with cast(), torch.no_grad():
        out = network(clip, *masks)
        assert out.target_tokens is not None
        _, views = network.video.student.encode(clip, masks.video, whole=1)
    return {
        "data": lambda: _data(trainer, batch),
        **_encoders(network, clip, masks, cast),
        "decoder": _decoder(network, views[-1], masks.video[-1], cast),
        "heads": _heads(network, out, cast),
        "prototypes": _prototypes(network, views[-1], masks.video[-1], out.target_tokens, cast),
        **_losses(trainer, out),
        **_updates(trainer, network, out),
    }


def _data(trainer: DiscovrTrainer, batch: Batch) -> tuple[Tensor, StepMasks]:
    clip = trainer.prepare_batch(batch, trainer.state.device, False)
    return clip, trainer._masks(0, clip, 0)


def _encoders(network: Discovr, clip: Tensor, masks: StepMasks, cast: Any) -> dict[str, Part]:
    branch, video = network.image, network.video.student
    assert branch is not None
    image = branch.student

    def image_teacher() -> None:
        with cast():
            branch._teach(clip)

    def image_students() -> None:
        image.zero_grad(set_to_none=True)
        with cast():
            cls, _ = image.encode(frames_of(clip, branch.student_frames), masks.image)
        cls.backward(torch.ones_like(cls))

    def video_teacher() -> None:
        with cast(), torch.no_grad():
            network.video.teacher.encode(clip, masks.teacher)

    def video_students() -> None:
        video.zero_grad(set_to_none=True)
        with cast():
            cls, tokens = video.encode(clip, masks.video, whole=1)
        ends = [cls[:-1], tokens]
        torch.autograd.backward(ends, [torch.ones_like(end) for end in ends])

    return {
        "image teacher": image_teacher,
        "image students": image_students,
        "video teacher": video_teacher,
        "video students": video_students,
    }


def _decoder(network: Discovr, view: Tensor, mask: Tensor, cast: Any) -> Part:
    part = network.video.decoder
    assert part is not None

    def run() -> None:
        part.zero_grad(set_to_none=True)
        with cast():
            z_v = part(view.detach().requires_grad_(), mask)
        z_v.backward(torch.ones_like(z_v))

    return run


def _heads(network: Discovr, out: Any, cast: Any) -> Part:
    assert network.image is not None

    def run() -> None:
        for student, teacher, cls in (
            (network.video.head, network.video.teacher_head, out.video_cls),
            (network.image.head, network.image.teacher_head, out.image_cls),
        ):
            student.zero_grad(set_to_none=True)
            with cast(), torch.no_grad():
                teacher(cls[-1])
            with cast():
                logits = student(cls[:-1].detach().requires_grad_())
            logits.backward(torch.ones_like(logits))

    return run


def _prototypes(network: Discovr, view: Tensor, mask: Tensor, z_i: Tensor, cast: Any) -> Part:
    assert network.video.decoder is not None and network.video.prototypes is not None
    with cast(), torch.no_grad():
        ready = network.video.decoder(view, mask)

    def run() -> None:
        assert network.video.prototypes is not None
        network.video.prototypes.grad = None
        with cast():
            z_v = ready.detach().requires_grad_()
            prototypes = nn.functional.normalize(network.video.prototypes, dim=-1)
            scores = [nn.functional.normalize(z, dim=-1) @ prototypes.T for z in (z_v, z_i)]
        torch.autograd.backward(scores, [torch.ones_like(s) for s in scores])

    return run


def _losses(trainer: DiscovrTrainer, out: Any) -> dict[str, Part]:
    objective = trainer.loss_function
    cluster = next(t for t in objective.terms.values() if isinstance(t, ClusterDistillation))
    sides = [s.detach().flatten(0, 1) for s in (out.target_scores, out.video_scores)]
    ready = [cluster.assign(side) for side in sides]

    def sinkhorn() -> None:
        for side in sides:
            cluster.assign(side)

    def losses() -> None:
        for field in ("video_logits", "image_logits", "video_scores", "target_scores"):
            setattr(out, field, getattr(out, field).detach().requires_grad_())
        with mock.patch.object(cluster, "assign", side_effect=list(ready)):
            objective(out, 0)["loss"].backward()

    return {"Sinkhorn": sinkhorn, "losses": losses}


def _updates(trainer: DiscovrTrainer, network: Discovr, out: Any) -> dict[str, Part]:
    def optimiser() -> None:
        for parameter in trainer.parameters:
            if parameter.grad is None:  # the parts timed before left theirs
                parameter.grad = torch.zeros_like(parameter)
        nn.utils.get_total_norm([p.grad for p in trainer.parameters if p.grad is not None])
        trainer.optimizer.step()

    def ema() -> None:
        logits = [
            x.float().mean(0, keepdim=True)
            for x in (out.video_teacher_logits, out.image_teacher_logits)
        ]
        network.update_teachers(0.996, *logits)

    return {"optimiser": optimiser, "EMA": ema}


def time_parts(trainer: DiscovrTrainer, batch: Batch, repeats: int) -> dict[str, float]:
    """Part -> median seconds. The parts take turns; the first round only warms up."""
    device = torch.device(trainer.state.device)
    calls = parts(trainer, batch)
    timings: dict[str, list[float]] = {name: [] for name in calls}
    for round_number in range(repeats + 1):
        for name, call in calls.items():
            start = now(device)
            call()
            if round_number:
                timings[name].append(now(device) - start)
    return {name: statistics.median(seconds) for name, seconds in timings.items()}
