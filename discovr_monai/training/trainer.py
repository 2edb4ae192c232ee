"""The training loop: MONAI's SupervisedTrainer with DISCOVR's iteration."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from ignite.engine import Events
from monai.engines import SupervisedTrainer
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from discovr_monai.base.distributed import all_reduce_mean, rank, world_size
from discovr_monai.base.schedules import Schedule
from discovr_monai.base.types import OUTPUT_FIELDS, DiscovrOutput, Stretch
from discovr_monai.losses.objective import Objective
from discovr_monai.networks.discovr import Discovr
from discovr_monai.networks.masking import StepMasks, TubeMasking
from discovr_monai.networks.parallel import gradients_stay_here
from discovr_monai.training.diagnostics import diagnose

PRECISIONS = {"fp32": None, "bf16": torch.bfloat16}


def _check_all_trained(network: Discovr, objective: Objective) -> None:
    """DistributedDataParallel waits for every gradient: none may be left out."""
    idle = [field for field in network.trained_fields if field not in objective.needs]
    wrapped = network.branches.values()
    if idle and any(isinstance(branch, DistributedDataParallel) for branch in wrapped):
        keys = ", ".join(OUTPUT_FIELDS[field]["trains"] for field in idle)
        raise ValueError(
            f"no term trains what makes {', '.join(idle)}, and several processes would wait for "
            f"its gradient: leave {keys} out (null, 0 or false), or give the term a weight"
        )


class DiscovrTrainer(SupervisedTrainer):
    """Trains :class:`Discovr` on an :class:`Objective`.

    Masks, augmentation and schedules depend on (seed, step) only, so a training resumes bit
    for bit from the position alone. After each iteration ``state.output`` is a list of one
    dict of floats: "loss", each term, "lr", "momentum", "grad_norm", "clips", and every
    ``diagnose_every`` steps the figures of :func:`diagnose`.

    Args:
        device, max_epochs, train_data_loader, network, optimizer, train_handlers: as in MONAI.
        objective: the weighted terms.
        masking: draws the masks of a step.
        prepare_batch: (batch, device, non_blocking) -> (B, 3, T, H, W) normalised.
        lr: learning rate by optimiser step; a parameter group's "lr_scale" multiplies it.
        teacher_momentum: EMA momentum by optimiser step.
        precision: "fp32", or "bf16" for autocast on any device.
        gradient_clip: largest norm of all gradients; None leaves them.
        accumulation_steps: batches per optimiser step. Sinkhorn balances each batch by
            itself; all else equals one big batch.
        max_skipped: optimiser steps in a row that may be skipped for a non-finite loss or
            gradient before training stops.
        diagnose_every: steps between diagnoses, 0 for never.
        sampler: told the epoch and, on resuming, the position inside it.

    Raises:
        ValueError: for an unknown precision, no batch in an epoch, or, on several processes, a
            part of the network that no term trains.
        FloatingPointError: after ``max_skipped`` non-finite steps, naming the batch's clips.
    """

    network: Discovr
    loss_function: Objective

    def __init__(
        self,
        *,
        device: torch.device | str,
        max_epochs: int,
        train_data_loader: Iterable,
        network: Discovr,
        optimizer: torch.optim.Optimizer,
        objective: Objective,
        masking: TubeMasking,
        prepare_batch: Callable[..., Tensor],
        lr: Schedule,
        teacher_momentum: Schedule,
        precision: str = "fp32",
        gradient_clip: float | None = None,
        accumulation_steps: int = 1,
        max_skipped: int = 5,
        diagnose_every: int = 10,
        sampler: Any = None,
        train_handlers: Sequence[Any] | None = None,
    ) -> None:
        if precision not in PRECISIONS:
            raise ValueError(f"precision {precision!r} must be one of {sorted(PRECISIONS)}")
        _check_all_trained(network, objective)
        super().__init__(
            device=device,
            max_epochs=max_epochs,
            train_data_loader=train_data_loader,
            network=network,
            optimizer=optimizer,
            loss_function=objective,
            prepare_batch=prepare_batch,
            train_handlers=train_handlers,
            decollate=False,
            optim_set_to_none=True,
            accumulation_steps=accumulation_steps,
        )
        if not self.state.epoch_length:
            raise ValueError(
                "an epoch holds no batch: there are fewer clips than batch_size (times ranks). "
                "Lower batch_size or add clips"
            )
        self.masking, self.lr, self.teacher_momentum = masking, lr, teacher_momentum
        self.precision = precision
        self.gradient_clip, self.max_skipped = gradient_clip, max_skipped
        self.diagnose_every = diagnose_every
        self.sampler = sampler
        self.first = 0  # batches of this epoch read under earlier world sizes
        self.earlier: list[Stretch] = []  # by which ranks
        self.parameters = [p for g in optimizer.param_groups for p in g["params"]]
        self.skipped = self.skipped_in_a_row = 0
        self._teacher_logits: dict[str, list[Tensor]] = {}
        self._failure: BaseException | None = None
        if getattr(train_data_loader, "generator", ...) is None:
            # a loader draws its workers' seed at every start, also at a resumed one
            train_data_loader.generator = torch.Generator()  # type: ignore[attr-defined]
        if sampler is not None:
            self.add_event_handler(Events.EPOCH_STARTED, self._place_sampler)

    def _handle_exception(self, e: BaseException) -> None:
        """Every handler may clean up, then the error goes on (Ignite lets handlers eat it)."""
        if self._failure is not e:
            self._failure = e
            self._fire_event(Events.EXCEPTION_RAISED, e)
        raise e

    def _place_sampler(self) -> None:
        done = self.state.iteration % self.state.epoch_length
        if not done:
            self.first, self.earlier = 0, []
        self.sampler.set_epoch(self.state.epoch - 1)
        self.sampler.set_position(done - self.first, self.earlier)

    @property
    def steps_per_epoch(self) -> int:
        """Optimiser steps; the last one of an epoch may hold fewer batches."""
        return math.ceil(self.state.epoch_length / self.accumulation_steps)

    @property
    def between_steps(self) -> bool:
        """True where no gradient is half accumulated: what a checkpoint can go on from."""
        _, micro, group = self._position()
        return micro == group - 1

    def position(self) -> dict[str, Any]:
        """How far the training is, and who read the epoch so far; for :meth:`go_on`."""
        done = self.state.iteration % self.state.epoch_length
        position: dict[str, Any] = {
            "iteration": self.state.iteration,
            "epoch_length": self.state.epoch_length,
        }
        if self.sampler is not None:
            now = Stretch(self.sampler.world_size, self.sampler.batch_size, done - self.first)
            position["rows"] = self.sampler.length
            position["stretches"] = [list(s) for s in (*self.earlier, now) if done]
        return position

    def go_on(self, position: Mapping[str, Any]) -> None:
        """Takes up a training where these or other ranks left it.

        What other ranks left of their epoch is shared out anew, less than a batch of it may be
        left out, and iterations are counted as if the ranks had always been these: so schedules
        go on at the same part of the training.

        Raises:
            ValueError: where the data are not as many, or cannot be shared out anew.
        """
        length, rows = self.state.epoch_length, position.get("rows")
        if self.sampler is None or rows is None:
            if position["epoch_length"] != length:
                raise ValueError(f"its epochs had {position['epoch_length']} batches, not {length}")
            self.state.iteration = position["iteration"]
        elif rows != self.sampler.length:
            raise ValueError(f"it was trained on {rows} clips, these are {self.sampler.length}")
        else:
            epoch = position["iteration"] // position["epoch_length"]
            self.earlier = [Stretch(*s) for s in position["stretches"]]
            own, done = (self.sampler.world_size, self.sampler.batch_size), 0
            if self.earlier and self.earlier[-1][:2] == own:
                done = self.earlier.pop().batches
            self.sampler.set_epoch(epoch)
            self.sampler.set_position(done, self.earlier)
            groups = -(-(length - self.sampler.left) // self.accumulation_steps)
            self.first = groups * self.accumulation_steps if self.earlier else 0
            self.state.iteration = epoch * length + min(self.first + done, length)
        self.state.epoch = self.state.iteration // length

    def _position(self) -> tuple[int, int, int]:
        """(optimiser step, index of this batch in its group, batches in the group), from 0."""
        epoch, batch = divmod(self.state.iteration - 1, self.state.epoch_length)
        group, micro = divmod(batch, self.accumulation_steps)
        size = min(
            self.accumulation_steps, self.state.epoch_length - group * self.accumulation_steps
        )
        return epoch * self.steps_per_epoch + group, micro, size

    def _iteration(self, engine: Any, batchdata: Mapping[str, Any]) -> Any:
        """One batch: the paper's algorithm, line by line."""
        step, micro, group = self._position()
        last = micro == group - 1
        clip = self.prepare_batch(batchdata, self.state.device, self.non_blocking)
        if micro == 0:
            self.optimizer.zero_grad(set_to_none=True)
            self._teacher_logits = {"video": [], "image": []}
        lr = self._set_lr(step)
        self.network.train()
        masks = self._masks(step, clip, (micro * world_size() + rank()) * len(clip))
        with gradients_stay_here(self.network, stay=not last):
            image = self._forward("image", clip, masks.image)
            losses = self._backward(image, step, group, "image")
            image = image.detached()
            video = self._forward("video", clip, masks.video, masks.teacher, image.target_tokens)
            output = image.joined(video)
            losses = self._sum(losses, self._backward(output, step, group, "video"))
        self._collect(output)
        result = self._optimiser_step(step, losses, batchdata) if last else _figures(losses)
        result.update(lr=lr, momentum=self.teacher_momentum(step), clips=len(clip) * world_size())
        result["skipped"] = self.skipped
        if last and self.diagnose_every and step % self.diagnose_every == 0:
            result.update(diagnose(output, self.loss_function, step))
        return [result]  # a list, as MONAI's handlers expect of decollated output

    def _masks(self, step: int, clip: Tensor, first: int) -> StepMasks:
        """Masks of clips that are the rows ``first`` on of a global batch."""
        image = self.network.image
        students = image is not None and image.head is not None
        return self.masking(
            step,
            range(first, first + len(clip)),
            video_grid=self.network.video.student.grid,
            image_grid=image.student.grid if students else None,  # type: ignore[union-attr]
            frames=len(image.student_frames) if students else 0,  # type: ignore[union-attr]
            device=clip.device,
        )

    def _autocast(self, clip: Tensor) -> torch.autocast:
        dtype = PRECISIONS[self.precision]
        return torch.autocast(clip.device.type, dtype=dtype, enabled=dtype is not None)

    def _forward(self, branch: str, clip: Tensor, *inputs: Tensor | None) -> DiscovrOutput:
        """The fields of one branch; none where there is no such branch."""
        if branch not in self.network.branches:
            return DiscovrOutput()
        with self._autocast(clip):
            return self.network.branches[branch](clip, *inputs)

    def _backward(
        self, output: DiscovrOutput, step: int, group: int, branch: str
    ) -> dict[str, Tensor]:
        """Takes the gradients of a branch's terms, and returns their values."""
        losses = self.loss_function(output, step, branch)
        if losses and losses["loss"].requires_grad:
            (losses["loss"] / group).backward()
        return {name: loss.detach() for name, loss in losses.items()}

    def _sum(self, image: dict[str, Tensor], video: dict[str, Tensor]) -> dict[str, Tensor]:
        """Both branches' values, in the order of the terms."""
        total = sum(losses["loss"] for losses in (image, video) if losses)
        assert isinstance(total, Tensor)
        values = {**image, **video}
        return {"loss": total, **{name: values[name] for name in self.loss_function.terms}}

    @torch.no_grad()
    def evaluate_batch(
        self, batch: Mapping[str, Any], number: int, first: int = 0
    ) -> dict[str, float]:
        """Losses of a validation batch under the masks of the rows ``first`` on of ``number``."""
        clip = self.prepare_batch(batch, self.state.device, self.non_blocking)
        masks = self._masks(number, clip, first)
        network = self.network.eval()
        with self._autocast(clip):
            output = network(clip, *masks)
        losses = self.loss_function(output, self._position()[0])
        return {name: float(value) for name, value in losses.items()}

    def run(self, *args: Any, **kwargs: Any) -> Any:
        """Trains to the last epoch; says so and returns where a resumed run is done already."""
        if self.state.epoch >= self.state.max_epochs:
            if not rank():
                print(
                    f"This training is complete ({self.state.epoch} epochs). --resume never "
                    "starts anew, more --epochs go on"
                )
            return self.state
        return super().run(*args, **kwargs)

    def _collect(self, output: DiscovrOutput) -> None:
        for branch, collected in self._teacher_logits.items():
            logits = getattr(output, f"{branch}_teacher_logits")
            if logits is not None:
                wide = torch.promote_types(logits.dtype, torch.float32)
                collected.append(logits.to(wide).mean(0, keepdim=True))  # (1, K)

    def _set_lr(self, step: int) -> float:
        lr = self.lr(step)
        for group in self.optimizer.param_groups:
            group["lr"] = lr * group.get("lr_scale", 1.0)
        return lr

    def _optimiser_step(
        self, step: int, losses: Mapping[str, Tensor], batch: Mapping[str, Any]
    ) -> dict[str, float]:
        """Steps optimiser, then teachers and centres; returns losses and the gradients' norm.

        The host waits for the device here, once a step, for all figures together. They are the
        same on every rank (losses are means, gradients too), so all ranks decide alike.
        """
        gradients = [p.grad for p in self.parameters if p.grad is not None]
        norm = nn.utils.get_total_norm(gradients)
        norm = norm.full_tensor() if hasattr(norm, "full_tensor") else norm
        result = _figures({**losses, "grad_norm": norm})
        if not (math.isfinite(result["grad_norm"]) and math.isfinite(result["loss"])):
            self._skip(step, result["loss"], result["grad_norm"], batch)
            return result
        self.skipped_in_a_row = 0
        if self.gradient_clip is not None and result["grad_norm"] > self.gradient_clip:
            nn.utils.clip_grads_with_norm_(self.parameters, self.gradient_clip, norm)
        self.optimizer.step()
        logits = {k: torch.cat(v) if v else None for k, v in self._teacher_logits.items()}
        self.network.update_teachers(self.teacher_momentum(step), logits["video"], logits["image"])
        return result

    def _skip(self, step: int, loss: float, norm: float, batch: Mapping[str, Any]) -> None:
        self.skipped += 1
        self.skipped_in_a_row += 1
        ids = ", ".join(str(i) for i in batch.get("id", batch.get("index", ["unknown"])))
        message = f"step {step}: loss {loss}, gradient norm {norm}; clips {ids}"
        self.logger.warning(f"skipped a non-finite {message}")
        if self.skipped_in_a_row >= self.max_skipped:
            raise FloatingPointError(
                f"{self.skipped_in_a_row} steps in a row were not finite, the last at {message}. "
                "The last good checkpoint is intact: lower lr or look at these clips, then resume"
            )


def _figures(values: Mapping[str, Tensor]) -> dict[str, float]:
    """Scalars as numbers, means over ranks, brought from the device together."""
    means = all_reduce_mean(torch.stack([value.detach() for value in values.values()]))
    return dict(zip(values, means.tolist(), strict=True))
