"""The loop: does it learn, accumulate, skip, refuse, resume?"""

from __future__ import annotations

import math

import pytest
import torch
from torch.utils.data import DataLoader

from discovr_monai.base.schedules import CosineRamp, WarmupCosine
from discovr_monai.data.clips.dataset import ClipDataset, EpochSampler
from discovr_monai.data.clips.normalise import PrepareClip
from discovr_monai.losses.distillation import SelfDistillation
from discovr_monai.losses.objective import Objective
from discovr_monai.networks.masking import TubeMasking
from discovr_monai.networks.parallel import parallel
from discovr_monai.training.checkpoint import Checkpoints
from discovr_monai.training.handlers import CollapseWatch, EpochMeans
from discovr_monai.training.optim import parameter_groups
from discovr_monai.training.trainer import DiscovrTrainer
from tests.conftest import tiny_network, tiny_objective


def add_clip(row):
    return {**row, "image": row["clip"]}


def rows(count=12):
    generator = torch.Generator().manual_seed(0)
    y, x = torch.meshgrid(torch.arange(16), torch.arange(16), indexing="ij")
    found = []
    for i in range(count):
        centre = torch.randint(4, 12, (2,), generator=generator)
        disc = ((x - centre[0]) ** 2 + (y - centre[1]) ** 2 < 12).byte() * 200
        noise = torch.randint(0, 50, (1, 4, 16, 16), generator=generator, dtype=torch.uint8)
        found.append({"clip": disc[None, None] + noise, "id": f"id{i}"})
    return found


def trainer(batch_size=4, epochs=2, objective=None, network=None, data=None, **options):
    torch.manual_seed(0)
    network = network or tiny_network()
    dataset = ClipDataset(data or rows(), add_clip, seed=1)
    sampler = EpochSampler(len(dataset), batch_size, seed=1)
    settings = {
        "device": "cpu",
        "max_epochs": epochs,
        "train_data_loader": DataLoader(dataset, batch_size, sampler=sampler),
        "network": network,
        "optimizer": torch.optim.AdamW(parameter_groups(network), lr=1e-3),
        "objective": objective or tiny_objective(),
        "masking": TubeMasking(4, 0.7, seed=1),
        "prepare_batch": PrepareClip(),
        "lr": WarmupCosine(1e-3, total=1000, warmup=2),
        "teacher_momentum": CosineRamp(0.9, 1.0, 1000),
        "sampler": sampler,
    }
    return DiscovrTrainer(**(settings | options))


def record(engine):
    seen = []
    from ignite.engine import Events

    engine.add_event_handler(
        Events.ITERATION_COMPLETED, lambda e: seen.append(dict(e.state.output[0]))
    )
    return seen


def test_it_learns():
    """Against fixed teachers and centres every term's loss falls."""
    torch.manual_seed(0)
    network = tiny_network(centre_momentum=1.0)
    options = {"lr": WarmupCosine(3e-3, total=90, warmup=5), "teacher_momentum": lambda step: 1.0}
    engine = trainer(epochs=30, network=network, **options)
    seen = record(engine)
    engine.run()
    for term in ("video", "image", "cluster"):
        first = sum(s[term] for s in seen[:3]) / 3
        last = sum(s[term] for s in seen[-3:]) / 3
        assert last < 0.9 * first, term


def same_state(a, b):
    left, right = a.network.state_dict(), b.network.state_dict()
    assert left.keys() == right.keys()
    return max(float((left[k] - right[k]).abs().max()) for k in left)


def test_accumulated_steps_equal_one_big_step():
    objective = {"video": SelfDistillation("video"), "image": SelfDistillation("image")}
    options = {"decoder": None, "num_prototypes": 0}
    runs = []
    for batch_size, steps in ((6, 1), (2, 3)):
        torch.manual_seed(0)
        network = tiny_network(**options).double()
        prepare = PrepareClip()
        engine = trainer(
            batch_size=batch_size,
            objective=Objective(objective),
            network=network,
            accumulation_steps=steps,
            prepare_batch=lambda *a, prepare=prepare: prepare(*a).double(),
        )
        engine.run()
        runs.append(engine)
    assert same_state(*runs) < 1e-12


class ReadsImages(torch.nn.Module):
    """A term of one's own that trains the image students, too."""

    needs = ("image_cls",)

    def forward(self, output, step=0):
        return output.image_cls.square().mean()


def test_several_terms_may_train_the_image_students():
    terms = dict(tiny_objective().terms) | {"own": ReadsImages()}
    engine = trainer(objective=Objective(terms), epochs=1)
    seen = record(engine)
    engine.run()
    assert list(seen[0])[:5] == ["loss", "video", "image", "cluster", "own"]
    assert seen[0]["loss"] == pytest.approx(sum(seen[0][name] for name in terms), rel=1e-5)
    assert all(p.grad is not None for p in engine.network.image.student.parameters())


def test_the_host_waits_for_the_device_once_a_step(monkeypatch):
    """Where something on a GPU is read, the host waits: figures are read together, masks not."""
    reads = []
    for name in ("item", "tolist", "__bool__", "__float__", "__int__"):
        original = getattr(torch.Tensor, name)
        monkeypatch.setattr(
            torch.Tensor,
            name,
            lambda self, *a, original=original, name=name: (
                reads.append(name),
                original(self, *a),
            )[1],
        )
    engine = trainer(epochs=1, gradient_clip=1.0, diagnose_every=0)
    counts = []
    iteration = engine._iteration

    def counted(*arguments):
        reads.clear()
        result = iteration(*arguments)
        counts.append(list(reads))
        return result

    engine._process_function = counted
    engine.run()
    assert counts[1:] == [["tolist"]] * (len(counts) - 1), counts


def test_teachers_follow_after_the_step():
    engine = trainer(epochs=1, lr=lambda step: 0.0, teacher_momentum=lambda step: 0.5)
    before = engine.network.video.teacher.cls_token.clone()
    engine.network.video.student.cls_token.data += 1
    engine.run()  # 3 steps without learning: the teacher covers 7/8 of the way
    moved = engine.network.video.teacher.cls_token - before
    torch.testing.assert_close(moved, torch.full_like(moved, 7 / 8))


def test_lr_and_momentum_are_counted_in_steps():
    engine = trainer(epochs=2, lr=lambda step: 0.01 * (step + 1), accumulation_steps=2)
    seen = record(engine)
    engine.run()  # 3 batches an epoch: groups of 2 and 1
    assert [round(s["lr"], 5) for s in seen] == [0.01, 0.01, 0.02, 0.03, 0.03, 0.04]
    assert ["grad_norm" in s for s in seen] == [False, True, True] * 2


def poison(engine, at):
    original = engine.prepare_batch
    count = {"n": -1}

    def prepare(*args, **kwargs):
        count["n"] += 1
        clip = original(*args, **kwargs)
        return clip * float("nan") if count["n"] in at else clip

    engine.prepare_batch = prepare


def test_a_non_finite_step_is_skipped_and_counted():
    engine = trainer(epochs=1)
    poison(engine, {1})
    seen = record(engine)
    engine.run()
    assert math.isnan(seen[1]["loss"])
    assert math.isfinite(seen[2]["loss"])
    assert engine.skipped == 1
    assert all(v.isfinite().all() for v in engine.network.state_dict().values())


def test_steps_in_a_row_that_are_not_finite_stop_with_the_clips_ids(tmp_path):
    engine = trainer(epochs=3, max_skipped=2)
    checkpoints = Checkpoints(tmp_path, save_every=1)
    checkpoints.attach(engine)
    poison(engine, {3, 4, 5})
    with pytest.raises(
        FloatingPointError, match=r"2 steps in a row .* clips id\d+, id\d+, .*intact"
    ):
        engine.run()
    kept = torch.load(tmp_path / "last.pt", weights_only=True)
    assert kept["iteration"] >= 3
    assert all(v.isfinite().all() for v in kept["network"].values())


def test_gradients_are_clipped():
    engine = trainer(epochs=1, gradient_clip=1e-12, lr=lambda step: 0.0)
    engine.run()
    total = torch.stack([p.grad.norm() for p in engine.parameters if p.grad is not None]).norm()
    assert float(total) <= 1.1e-12


def test_bf16_trains():
    engine = trainer(epochs=1, precision="bf16")
    seen = record(engine)
    engine.run()
    assert all(math.isfinite(s["loss"]) for s in seen)
    assert engine.network.video.student.cls_token.dtype == torch.float32


def test_diagnoses_tell_a_collapsed_teacher():
    engine = trainer(epochs=1, diagnose_every=1)
    seen = record(engine)
    engine.run()
    assert 0 < seen[0]["video_entropy"] <= 1
    assert 0 < seen[0]["prototypes_used_target"] <= 1
    assert seen[0]["video_effective_rank"] > 1.5


def test_collapse_is_reported_in_words():
    network = tiny_network()
    torch.nn.init.zeros_(network.video.teacher_head.last_layer.weight_v)
    engine = trainer(epochs=3, diagnose_every=1, network=network, teacher_momentum=lambda s: 1.0)
    CollapseWatch(warm_up=1, patience=3).attach(engine)
    engine.logger = Warnings()
    engine.run()
    assert any(
        "collapse: step" in w and "video teacher says the same" in w for w in engine.logger.seen
    )


class Warnings:
    def __init__(self):
        self.seen = []

    def warning(self, message):
        self.seen.append(message)

    def info(self, *args):
        pass

    error = debug = info


def test_epoch_means():
    engine = trainer(epochs=1)
    seen = record(engine)
    EpochMeans().attach(engine)
    engine.run()
    mean = sum(s["loss"] for s in seen) / len(seen)
    assert engine.state.metrics["epoch_loss"] == pytest.approx(mean)


def test_an_epoch_without_a_batch_is_refused():
    with pytest.raises(ValueError, match="fewer clips than batch_size"):
        trainer(batch_size=99)


def test_an_unknown_precision_is_refused():
    with pytest.raises(ValueError, match="precision 'fp8' must be one of"):
        trainer(precision="fp8")


def test_a_part_that_nothing_trains_is_refused_on_several_processes(tmp_path):
    """DistributedDataParallel would wait for its gradient, and say so at the second step."""
    store = torch.distributed.FileStore(str(tmp_path / "store"), 1)
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        network = parallel(tiny_network(), torch.device("cpu"))
        trainer(network=network)
        objective = Objective({"video": SelfDistillation("video")})
        message = "no term trains what makes image_logits, video_scores, .*leave image_head_def"
        with pytest.raises(ValueError, match=message):
            trainer(network=network, objective=objective)
    finally:
        torch.distributed.destroy_process_group()


def test_clips_are_normalised_as_imagenet():
    clip = PrepareClip()({"image": torch.full((2, 1, 4, 8, 8), 255, dtype=torch.uint8)})
    assert clip.shape == (2, 3, 4, 8, 8)
    torch.testing.assert_close(
        clip[0, :, 0, 0, 0], torch.tensor([2.2489, 2.4286, 2.6400]), atol=1e-4, rtol=0
    )


def test_what_is_not_decayed():
    network = tiny_network()
    decayed, free = parameter_groups(network, 0.05)
    names = {id(p): n for n, p in network.state_dict(keep_vars=True).items()}
    free_names = {names[id(p)] for p in free["params"]}
    assert free["weight_decay"] == 0
    assert {"prototypes", "decoder.mask_token", "video_student.cls_token"} <= free_names
    assert not any(n.endswith("mlp.fc1.weight") for n in free_names)
    assert not any("teacher" in n for n in free_names | {names[id(p)] for p in decayed["params"]})
