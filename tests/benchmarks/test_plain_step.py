"""Our step equals the plain formulation of it, and needs what benchmarks/speed/operations.py counts."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from argparse import Namespace
from pathlib import Path
from unittest import mock

import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from discovr_monai.networks.vit import Block

ROOT = Path(__file__).parents[2]
sys.path += [str(ROOT / "benchmarks"), str(ROOT / "benchmarks" / "speed")]

import operations  # noqa: E402
import plain_step  # noqa: E402
import step_memory  # noqa: E402
import step_parts  # noqa: E402
import train_step  # noqa: E402
from shared import END, begin, write_between_markers  # noqa: E402
from step_memory import settings_of  # noqa: E402
from step_report import _options  # noqa: E402
from step_setup import build, difference, step  # noqa: E402


def pair(dtype=torch.float32, seed=0, **options):
    """Both trainers with the same random parameters: none is at its start of zero or one."""
    made = [build("S", quick=True, plain=plain, **options) for plain in (False, True)]
    generator = torch.Generator().manual_seed(seed)
    ours, plain = (trainer for trainer, _ in made)
    with torch.no_grad():
        for parameter in ours.network.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.add_(0.1 * noise)
    plain.network.load_state_dict(ours.network.state_dict())
    for trainer in (ours, plain):
        trainer.network.to(dtype)
        prepare = trainer.prepare_batch
        trainer.prepare_batch = lambda *a, prepare=prepare: prepare(*a).to(dtype)
    return ours, plain, made[0][1]


def forward_and_backward(trainer, batch, number):
    """Loss and terms of one iteration under the masks of a step, which updates nothing."""
    trainer.state.iteration, trainer.gradient_clip = number + 1, None
    trainer.lr, trainer.teacher_momentum = (lambda step: 1e-3), (lambda step: 0.9)
    still = mock.patch.object(trainer.network, "update_teachers")
    with still, mock.patch.object(trainer.optimizer, "step"):
        return trainer._iteration(trainer, batch)[0]


@pytest.mark.parametrize(("dtype", "limit"), [(torch.float32, 1e-5), (torch.float64, 1e-12)])
@settings(deadline=None, max_examples=5, phases=(Phase.generate,))
@given(seed=st.integers(0, 10**6), number=st.integers(0, 10**6))
def test_loss_and_every_gradient_are_the_plain_ones(dtype, limit, seed, number):
    ours, plain, batch = pair(dtype, seed, teacher_keep=0.6)
    batch["image"] = torch.randint_like(batch["image"], 256)
    losses = [forward_and_backward(trainer, batch, number) for trainer in (ours, plain)]
    for name, value in losses[1].items():
        assert losses[0][name] == pytest.approx(value, rel=limit), name
    found = difference(ours, plain)
    trained = {n for n, p in ours.network.named_parameters() if p.requires_grad}
    with_gradient = {n for n, p in plain.network.named_parameters() if p.grad is not None}
    assert with_gradient == trained
    assert max(found.values()) < limit, max(found, key=found.get)


def test_the_comparison_sees_one_wrong_scale_and_one_missing_gradient():
    ours, plain, batch = pair(torch.float64)
    real = plain_step.plain_attention

    def wrong(attention, x):
        return real(attention, x) * (1 + 1e-6)

    forward_and_backward(ours, batch, 0)
    with mock.patch.object(plain_step, "plain_attention", wrong):
        forward_and_backward(plain, batch, 0)
    assert max(difference(ours, plain).values()) > 1e-8
    plain.network.video.student.cls_token.grad = None
    assert difference(plain, ours)["video.student.cls_token"] == float("inf")


def test_whole_steps_leave_the_same_students_teachers_and_centres():
    """Optimiser, averages and centres: three steps of the trainer, the last from moved teachers."""
    ours, plain, batch = pair(torch.float64)
    before = {k: v.clone() for k, v in ours.network.state_dict().items()}
    for trainer in (ours, plain):
        trainer.lr, trainer.teacher_momentum = (lambda step: 1e-3), (lambda step: 0.9)
        for _ in range(3):
            step(trainer, batch)
    theirs = plain.network.state_dict()
    for name, value in ours.network.state_dict().items():
        torch.testing.assert_close(value, theirs[name], rtol=1e-6, atol=1e-9, msg=name)
    for name in ("video_teacher.norm.weight", "image_teacher_head.mlp.0.bias", "video_centre"):
        assert not torch.equal(theirs[name], before[name])


def test_plain_is_plain():
    """Views one by one, all tokens embedded, the image teacher twice, no fused attention."""
    _, plain, batch = pair()
    network, seen = plain.network, {}
    for name in ("video.student", "video.teacher", "image.student", "image.teacher"):
        embed = network.get_submodule(name).patch_embed
        shapes = seen.setdefault(name, [])
        embed.register_forward_hook(lambda _, x, y, shapes=shapes: shapes.append(y.shape[:2]))
    with mock.patch("torch.nn.functional.scaled_dot_product_attention", side_effect=AssertionError):
        forward_and_backward(plain, batch, 0)
    tokens = network.video.student.num_tokens
    frames = 2 * network.video.student.clip_shape[1]
    assert seen["video.student"] == [(2, tokens)] * 5
    assert seen["video.teacher"] == [(2, tokens)]
    assert seen["image.student"] == [(frames, network.image.student.num_tokens)] * 4
    assert seen["image.teacher"] == [(frames, network.image.student.num_tokens)] * 2
    flags = {(group["foreach"], group["fused"]) for group in plain.optimizer.param_groups}
    assert flags == {(False, False)}


def needed(trainer, batch=2):
    return train_step.count(trainer, batch)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"image_frame_step": 2},
        {"image_frame_step": 3, "mask_ratio": 0.6, "num_views": 2},
        {"teacher_keep": 0.3},
    ],
    ids=["default", "frames", "views", "teacher"],
)
def test_the_counter_agrees_with_torch_on_the_real_step(precision, options):
    trainer, batch = build("S", quick=True, precision=precision, batch=3, **options)
    seen = operations.counted(lambda: step(trainer, batch))
    assert sum(needed(trainer, 3).values()) == pytest.approx(seen, rel=0.02)


@pytest.mark.parametrize("share", [1.0, 0.3])
def test_the_counter_agrees_on_each_part(share):
    trainer, batch = build("S", quick=True, teacher_keep=share)
    calls = step_parts.parts(trainer, batch)
    parts = needed(trainer)
    assert calls.keys() >= parts.keys()
    for name, call in calls.items():
        assert parts.get(name, 0) == pytest.approx(operations.counted(call), rel=0.02), name


def test_recomputation_repeats_the_blocks_that_train_and_is_not_counted_as_needed():
    trainer, batch = build("S", quick=True, activation_checkpointing=True)
    network, parts = trainer.network, needed(trainer)
    assert parts == needed(build("S", quick=True)[0])
    forward = 0.0
    for block in (m for m in network.modules() if isinstance(m, Block) and m.recompute):
        block.register_forward_pre_hook(
            lambda block, x, options: seen.append((block, *x, options.get("cls_only", False))),
            with_kwargs=True,
        )
    seen: list = []
    found = operations.counted(lambda: step(trainer, batch))
    last = 0.0
    for block, x, cls_only in seen:
        sequences, tokens, width = x.shape
        cls = sequences if cls_only else 0
        forward += operations.blocks([block], sequences, tokens, train=False, cls_only=cls)
        rows = sequences * tokens - cls * (tokens - 1)
        last += 2.0 * rows * width * block.mlp.fc1.out_features
    total = sum(parts.values())
    assert found == pytest.approx(total + forward - last, rel=0.005)  # a block's last is not needed


def test_plain_does_only_the_named_work_more():
    """An image teacher, the embedding of masked tokens with its gradient, whole last blocks."""
    ours, plain, batch = pair()
    parts = needed(ours)
    extra = 0.0
    for name, sequences, views in (
        ("video.student", 2, 5), ("image.student", 16, 4), ("video.teacher", 2, 1),
        ("image.teacher", 16, 2),
    ):  # fmt: skip
        encoder, student = ours.network.get_submodule(name), name.endswith("student")
        grid = encoder.grid[1] * encoder.grid[2]
        hidden = int(0.75 * grid) if student else 0
        if student:
            masked = encoder.grid[0] * hidden * sequences * views
            extra += 2 * 2.0 * masked * encoder.patch_embed.in_features * encoder.embed_dim
        visible = encoder.grid[0] * (grid - hidden)
        whole = operations.encoder(encoder, views * sequences, visible, train=student)
        extra += whole - parts[name.replace("student", "students").replace(".", " ")]
    seen = operations.counted(lambda: step(plain, batch))
    assert seen == pytest.approx(sum(parts.values()) + extra, rel=1e-6)


def test_a_quick_run_writes_every_key(tmp_path):
    script = [sys.executable, str(ROOT / "benchmarks" / "speed" / "train_step.py"), "--quick"]
    asked = ["--sizes", "S", "--repeats", "1", "--device", "cpu", "--out", str(tmp_path)]
    done = subprocess.run([*script, *asked], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    bench = json.loads((tmp_path / "bench.json").read_text())
    assert {"date", "machine", "peaks", "batch", "repeats"} <= bench.keys()
    assert {"threads", "torch", "cpu", "gpu", "device"} <= bench["machine"].keys()
    found = bench["sizes"]["S"]
    for key in ("ratio_fp32", "ratio_bf16", "ratio_plain_fp32_to_ours_bf16"):
        low, high = found[f"{key}_spread"]
        assert 0 < low <= found[key] <= high
    for precision in ("fp32", "bf16"):
        assert found[f"share_of_peak_{precision}"] > 0  # of a timed peak: above 1 under load
        parts = found["parts"][precision]
        assert {*needed(build("S", quick=True)[0]), "data", "losses", "the rest"} <= parts.keys()
    assert found["memory_ratio"] > 0
    assert found["equal"]["gradient"] < 1e-5
    assert "--quick: tiny sizes. These figures mean nothing." in done.stdout
    assert re.search(r"\| image teacher \| [\d.]+ \|", done.stdout)


def test_an_option_is_measured_against_our_default():
    common = {"batch": 2, "quick": True, "device": "cpu"}
    options = Namespace(precisions=["fp32"], repeats=1)
    with mock.patch.object(train_step, "peak_of", return_value=7.0) as child:
        found = train_step.measure_option("S", "image_frame_step=4", options, common)
    assert child.call_args.args[0]["option"] == "image_frame_step=4"
    assert found["memory_bytes"] == {"fp32": 7.0}
    low, high = found["ratio_fp32_spread"]
    assert 0 < low <= found["ratio_fp32"] <= high
    assert found["operations"] < 1
    assert len(found["first_steps"]["fp32"]) == 2


def test_a_larger_batch_is_measured_by_the_clip(monkeypatch):
    """Four clips at a second a step against two: the same step is twice as fast by the clip."""
    clock = iter(range(1000))
    monkeypatch.setattr(train_step, "now", lambda device: next(clock))
    monkeypatch.setattr(train_step, "peak_of", lambda job: 7.0)
    common = {"batch": 2, "quick": True, "device": "cpu"}
    options = Namespace(precisions=["fp32"], repeats=2)
    found = train_step.measure_option("S", "batch=2x", options, common)
    assert found["ratio_fp32"] == 2
    assert [s["median"] for s in found["seconds_per_clip"]["fp32"]] == [0.5, 0.25]
    assert found["first_steps"]["fp32"] == [2, 2]
    assert found["operations"] == pytest.approx(
        1, abs=0.15
    )  # only optimiser-like parts do not grow


def test_the_options_table(monkeypatch):
    monkeypatch.setattr(train_step, "peak_of", lambda job: 2.0**30)
    common = {"batch": 2, "quick": True, "device": "cpu"}
    options = Namespace(precisions=["fp32"], repeats=1)
    rows = {o: train_step.measure_option("S", o, options, common) for o in ("teacher_keep=0.5",)}
    lines = _options({"options": rows, "memory_bytes": {"ours_fp32": 2.0**31}})
    assert len({line.count("|") for line in lines}) == 1
    assert re.match(r"\| teacher_keep=0.5 \| \d+ % \| fp32 \| .* \| 2.00 \| [\d.]+ to", lines[2])


def test_the_memory_of_an_option_is_that_of_its_own_settings_and_batch():
    job = {"size": "S", "precision": "fp32", "batch": 1, "quick": True, "device": "cpu"}
    with mock.patch.object(step_memory, "build", wraps=build) as made:
        step_memory.peak_memory({**job, "option": "num_views=2,batch=3x"})
    assert made.call_args.kwargs["batch"] == 3
    assert made.call_args.kwargs["num_views"] == 2


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_missing_gpu_is_said_plainly(capsys):
    with pytest.raises(SystemExit, match="PyTorch sees no CUDA GPU here; use --device cpu"):
        train_step.pick_device("cuda")
    assert train_step.pick_device("auto") == torch.device("cpu")
    assert "no CUDA GPU here" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("option", "expected"),
    [
        ("image_frame_step=4", ({"image_frame_step": 4}, 1)),
        ("teacher_keep=0.5", ({"teacher_keep": 0.5}, 1)),
        ("activation_checkpointing", ({"activation_checkpointing": True}, 1)),
        ("compile", ({"compile": True}, 1)),
        ("num_views=2,batch=2x", ({"num_views": 2}, 2)),
        ("compile,activation_checkpointing,batch=12x",
         ({"compile": True, "activation_checkpointing": True}, 12)),
    ],
)  # fmt: skip
def test_options_become_config_keys(option, expected):
    assert settings_of(option) == expected


@pytest.mark.parametrize(
    "option",
    ["image_frame_step=1", "image_frame_step", "compile=2", "else", "teacher_keep=1.0", "batch=2",
     "teacher_keep=0.0", "num_views=0", "compile,compile", "", "compile,"],
)  # fmt: skip
def test_unknown_options_are_refused(option):
    with pytest.raises(ValueError, match=rf"--options {option}: know image_frame_step=N"):
        settings_of(option)


def test_tables_go_between_the_markers_and_nowhere_else(tmp_path):
    file = tmp_path / "page.md"
    file.write_text(f"before\n{begin('speed/train_step.py')}\nold\n{END}\nafter\n")
    write_between_markers(file, "new", "speed/train_step.py")
    assert file.read_text() == f"before\n{begin('speed/train_step.py')}\nnew\n{END}\nafter\n"
    file.write_text("none")
    with pytest.raises(ValueError, match=r"page.md has no markers .* put them back"):
        write_between_markers(file, "new", "speed/train_step.py")


def test_the_page_has_its_markers():
    page = (ROOT / "docs" / "performance.md").read_text()
    assert page.count(begin("speed/train_step.py")) == 1
    assert page.index(begin("speed/train_step.py")) < page.index(END)


def test_peak_memory_sees_what_was_freed():
    code = (
        "import sys; sys.path.append('benchmarks/speed'); import torch; from step_memory import *\n"
        "before = highest_memory(); torch.ones(2**26); print(highest_memory() - before)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert float(done.stdout) == pytest.approx(2**28, rel=0.1), done.stderr
