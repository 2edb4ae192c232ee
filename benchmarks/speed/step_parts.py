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
from discovr_monai.networks.discovr import Discovr, _frames
from discovr_monai.training.trainer import PRECISIONS, DiscovrTrainer, unwrap

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
    network = unwrap(trainer.network)
    clip, masks = _data(trainer, batch)
    dtype = PRECISIONS[trainer.precision]

    def cast() -> AbstractContextManager:
        return torch.autocast(clip.device.type, dtype=dtype, enabled=dtype is not None)

    with cast(), torch.no_grad():
        out = network(clip, *masks)
        _, views = network.video_student.encode(clip, masks[0], whole=1)
        assert network.image_teacher is not None
        tokens = network.image_teacher(_frames(clip, network.target_frames))
        tokens = tokens.unflatten(0, (len(clip), -1))
    return {
        "data": lambda: _data(trainer, batch),
        **_encoders(network, clip, masks, cast),
        "decoder": _decoder(network, views[-1], masks[0][-1], cast),
        "heads": _heads(network, out, cast),
        "prototypes": _prototypes(network, clip, views[-1], masks[0][-1], tokens, cast),
        **_losses(trainer, out),
        **_updates(trainer, network, out),
    }


def _data(
    trainer: DiscovrTrainer, batch: Batch
) -> tuple[Tensor, tuple[Tensor, Tensor, Tensor | None]]:
    clip = trainer.prepare_batch(batch, trainer.state.device, False)
    network = unwrap(trainer.network)
    assert network.image_student is not None
    video, image, teacher = trainer.masking(
        0,
        range(len(clip)),
        video_grid=network.video_student.grid,
        image_grid=network.image_student.grid,
        frames=len(network.student_frames),
        device=clip.device,
    )
    assert image is not None
    return clip, (video, image, teacher)


def _encoders(network: Discovr, clip: Tensor, masks: tuple, cast: Any) -> dict[str, Part]:
    video, image, teacher = network.video_student, network.image_student, network.image_teacher
    assert image is not None and teacher is not None

    def image_teacher() -> None:
        with cast(), torch.no_grad():
            teacher.encode(
                _frames(clip, network.teacher_frames), whole=len(clip) * len(network.target_frames)
            )

    def image_students() -> None:
        image.zero_grad(set_to_none=True)
        with cast():
            cls, _ = image.encode(_frames(clip, network.student_frames), masks[1])
        cls.backward(torch.ones_like(cls))

    def video_teacher() -> None:
        with cast(), torch.no_grad():
            network.video_teacher.encode(clip, masks[2])

    def video_students() -> None:
        video.zero_grad(set_to_none=True)
        with cast():
            cls, tokens = video.encode(clip, masks[0], whole=1)
        ends = [cls[:-1], tokens]
        torch.autograd.backward(ends, [torch.ones_like(end) for end in ends])

    return {
        "image teacher": image_teacher,
        "image students": image_students,
        "video teacher": video_teacher,
        "video students": video_students,
    }


def _decoder(network: Discovr, view: Tensor, mask: Tensor, cast: Any) -> Part:
    part = network.decoder
    assert part is not None

    def run() -> None:
        part.zero_grad(set_to_none=True)
        with cast():
            z_v = part(view.detach().requires_grad_(), mask)
        z_v.backward(torch.ones_like(z_v))

    return run


def _heads(network: Discovr, out: Any, cast: Any) -> Part:
    def run() -> None:
        for student, teacher, cls in (
            (network.video_head, network.video_teacher_head, out.video_cls),
            (network.image_head, network.image_teacher_head, out.image_cls),
        ):
            student.zero_grad(set_to_none=True)
            with cast(), torch.no_grad():
                teacher(cls[-1])
            with cast():
                logits = student(cls[:-1].detach().requires_grad_())
            logits.backward(torch.ones_like(logits))

    return run


def _prototypes(
    network: Discovr, clip: Tensor, view: Tensor, mask: Tensor, tokens: Tensor, cast: Any
) -> Part:
    assert network.decoder is not None and network.prototypes is not None
    with cast(), torch.no_grad():
        ready = network.decoder(view, mask)

    def run() -> None:
        assert network.prototypes is not None
        network.prototypes.grad = None
        with cast():
            z_v = ready.detach().requires_grad_()
            z_i = network._cluster_target(clip, tokens)
            prototypes = nn.functional.normalize(network.prototypes, dim=-1)
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
