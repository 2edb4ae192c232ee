"""Activation checkpointing and compilation leave losses, gradients and checkpoints as they are."""

from __future__ import annotations

import copy
import functools
import platform
import subprocess
import sys
import textwrap

import pytest
import torch
from torch import nn

from discovr_monai.networks import vit
from discovr_monai.networks.parallel import accelerate, parallel
from tests.conftest import tiny_encoder, tiny_network, tiny_objective
from tests.networks.test_discovr import masks_for

SCORES = {"video": "video_logits", "image": "image_logits", "cluster": "video_scores"}
VIDEO_ALONE = {"image": None, "image_head": None, "decoder": None, "num_prototypes": 0}


def has_compiler() -> bool:
    from torch._inductor.cpp_builder import get_cpp_compiler

    try:
        return bool(get_cpp_compiler())
    except RuntimeError:
        return False


def pair(parts=None, **options):
    """Two networks of the same weights, none of them at its start of zero; one accelerated."""
    torch.manual_seed(0)
    network = tiny_network(**(parts or {}))
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return network, accelerate(copy.deepcopy(network), **options)


def losses_and_gradients(network, clip, dtype=None):
    with torch.autocast("cpu", dtype=dtype, enabled=dtype is not None):
        output = network(clip, *masks_for(network))
    terms = tiny_objective().terms
    names = [t for t in terms if getattr(output, SCORES[t]) is not None]
    losses = {name: terms[name](output) for name in names}
    sum(losses.values()).backward()
    found = {n: p.grad for n, p in network.named_parameters() if p.grad is not None}
    assert found.keys() == {n for n, p in network.named_parameters() if p.requires_grad}
    return losses, found


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_recomputed_blocks_give_the_same_to_the_last_bit(clip, dtype):
    plain, changed = pair(activation_checkpointing=True)
    expected, found = (losses_and_gradients(n, clip, dtype) for n in (plain, changed))
    for one, other in zip(expected, found, strict=True):
        assert one.keys() == other.keys()
        for name, value in one.items():
            assert torch.equal(value, other[name]), name


def test_blocks_that_train_are_recomputed_and_no_others(network, clip, monkeypatch):
    accelerate(network, activation_checkpointing=True)
    marked = {n for n, m in network.named_modules() if getattr(m, "recompute", False)}
    parts = {name.partition(".blocks")[0] for name in marked}
    assert parts == {"video.student", "image.student", "video.decoder"}
    assert len(marked) == 2 + 2 + 1
    monkeypatch.setattr(vit, "checkpoint", None)  # any use of it would raise
    with torch.no_grad():
        network(clip, *masks_for(network))  # validation
    with pytest.raises(TypeError, match="not callable"):
        network(clip, *masks_for(network))


def test_recomputed_blocks_keep_less(clip):
    kept = []
    for network in pair(activation_checkpointing=True):
        sizes = []
        pack = lambda x, sizes=sizes: (sizes.append(x.nbytes), x)[1]  # noqa: E731
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            network.video.student(clip).sum()
        kept.append(sum(sizes))
    assert kept[1] < 0.5 * kept[0]


def test_hooks_of_a_block_fire_once(clip):
    encoder = accelerate(tiny_encoder(), activation_checkpointing=True)
    calls = []
    encoder.blocks[0].register_forward_hook(lambda *_: calls.append("block"))
    encoder(clip).sum().backward()
    assert calls == ["block"]


@pytest.fixture
def quick_compiler(monkeypatch):
    """Everything of torch.compile but the code generation, which takes long."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    through = functools.partialmethod(nn.Module.compile, backend="aot_eager", fullgraph=True)
    monkeypatch.setattr(vit.Block, "compile", through)
    yield torch._dynamo.utils.counters
    torch._dynamo.reset()


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_a_block_is_one_graph_with_and_without_recomputation(clip, dtype, quick_compiler):
    for recompute in (False, True):
        plain, changed = pair(activation_checkpointing=recompute, compile=True)
        expected, found = (losses_and_gradients(n, clip, dtype) for n in (plain, changed))
        for one, other in zip(expected, found, strict=True):
            for name, value in one.items():
                if dtype is None:
                    torch.testing.assert_close(other[name], value, rtol=1e-5, atol=1e-5, msg=name)
                else:  # another order of roundings
                    assert (other[name] - value).norm() < 0.05 * value.norm(), name
    # five kinds of block (four encoders and the decoder), and six of last blocks: CLS alone in
    # each encoder, everything where some views or frames stay whole (video student, image
    # teacher). The six that train have another graph with recomputation.
    assert quick_compiler["stats"]["unique_graphs"] == 5 + 6 + 6
    assert not quick_compiler["graph_break"]


def test_compiled_and_recomputed_blocks_inside_ddp(clip, quick_compiler, tmp_path):
    store = torch.distributed.FileStore(str(tmp_path / "store"), 1)
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        plain, changed = pair(activation_checkpointing=True, compile=True)
        inside = parallel(changed, torch.device("cpu"))
        _, expected = losses_and_gradients(plain, clip)
        _, found = losses_and_gradients(inside, clip)
    finally:
        torch.distributed.destroy_process_group()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-5, atol=1e-5, msg=name)


@pytest.mark.skipif(not has_compiler(), reason="torch.compile needs a C++ compiler: install g++")
def test_compiled_blocks_give_the_same_and_their_checkpoints_fit(clip, tmp_path):
    torch._dynamo.reset()
    plain, changed = pair(VIDEO_ALONE, compile=True)  # two kinds of block: each takes its time
    assert list(changed.state_dict()) == list(plain.state_dict())
    expected, found = (losses_and_gradients(n, clip) for n in (plain, changed))
    for one, other in zip(expected, found, strict=True):
        for name, value in one.items():
            torch.testing.assert_close(other[name], value, rtol=1e-5, atol=1e-5, msg=name)
    torch.save(changed.state_dict(), tmp_path / "compiled.pt")
    fresh = tiny_network(**VIDEO_ALONE)
    fresh.load_state_dict(torch.load(tmp_path / "compiled.pt", weights_only=True))
    changed.load_state_dict(fresh.state_dict())
    assert copy.deepcopy(changed).video.student.settings == plain.video.student.settings


def test_a_missing_compiler_is_said_before_the_first_step(network):
    with (
        torch._inductor.config.patch({"cpp.cxx": (None, "no-such-compiler")}),
        pytest.raises(ValueError, match=r"^compile: true needs a C\+\+ compiler and finds none: "),
    ):
        accelerate(network, compile=True)


def test_nothing_asked_changes_nothing(network):
    before = list(network.state_dict())
    assert accelerate(network) is network
    assert list(network.state_dict()) == before
    blocks = [m for m in network.modules() if isinstance(m, vit.Block)]
    assert not any(b.recompute or b._compiled_call_impl for b in blocks)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library")
def test_freed_memory_is_used_again():
    code = """
        import resource, sys, torch
        from discovr_monai.networks.parallel import accelerate, parallel
        if sys.argv[1] == "kept":
            accelerate(torch.nn.Linear(1, 1))
        faults = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        for round in range(40):
            if round == 30:  # at first, small ones that lie in a freed place cost a new one
                before = faults()
            array = torch.ones(16 << 20)  # 64 MB
            del array
        print(faults() - before)
    """
    faults = {
        kind: int(
            subprocess.run(
                [sys.executable, "-c", textwrap.dedent(code), kind],
                capture_output=True, text=True, check=True,
            ).stdout
        )
        for kind in ("kept", "usual")
    }  # fmt: skip
    assert faults["kept"] < faults["usual"] / 3
