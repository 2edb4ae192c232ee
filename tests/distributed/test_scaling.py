"""benchmarks/speed/scaling.py against the trainer's own step under DDP, and against arithmetic by hand."""

from __future__ import annotations

import dataclasses
import json
import sys
from collections import Counter
from pathlib import Path
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st
from ignite.engine import Events
from monai.bundle import ConfigParser
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook

from discovr_monai.losses import clustering
from discovr_monai.training.checkpoint import Checkpoints

ROOT = Path(__file__).parents[2]
sys.path += [str(ROOT / "benchmarks"), str(ROOT / "benchmarks" / "speed")]

import scaling  # noqa: E402
import scaling_model as model  # noqa: E402
from shared import END, begin  # noqa: E402
from step_setup import CONFIGS, QUICK, build, step  # noqa: E402

CASES = {
    "paper": {},
    "batch norm": {"head_norm": "batch"},
    "sinkhorn": {"centring": "sinkhorn", "sinkhorn_iterations": 4},
    "accumulated": {"accumulation_steps": 2},
}
SLOW = model.Fabric("slow", inside=8.0, between=2.0, inside_hop=1.0, between_hop=10.0)


def as_the_overlay_does(network):
    """What multi_gpu_train.yaml makes of a network."""
    parser = ConfigParser()
    configs = [CONFIGS / f"{name}.yaml" for name in ("train", "multi_gpu_train")]
    parser.read_config([str(config) for config in configs])
    parser["network_def"] = network
    return parser.get_parsed_content("network")


def watch(settings, folder):
    """Bytes of every exchange of a step of the real training: {kind: [bytes, ...]}."""
    settings = dict(settings)
    batches = settings.pop("accumulation_steps", 1)
    trainer, batch = build("B", quick=True, **settings)
    trainer.accumulation_steps = trainer.state.epoch_length = batches
    trainer.data_loader, trainer.state.max_epochs = [batch] * batches, 3
    seen = {"reduced": [], "gradients": [], "buffers": []}
    trainer.network = as_the_overlay_does(trainer.network)
    for branch in trainer.network.branches.values():
        assert branch.gradient_as_bucket_view  # no second copy of the gradients
        branch.register_comm_hook(None, allreduce_hook)
    Checkpoints(folder, resume="never").attach(trainer)
    reduce, broadcast = dist.all_reduce, dist._broadcast_coalesced

    def all_reduce(tensor, *args, **options):
        kind = "gradients" if options.get("async_op") else "reduced"
        seen[kind].append(tensor.nbytes)
        return reduce(tensor, *args, **options)

    def broadcast_coalesced(group, tensors, *args):
        seen["buffers"].append(sum(t.nbytes for t in tensors))
        return broadcast(group, tensors, *args)

    @trainer.on(Events.EPOCH_STARTED)  # one step each; the first ones set DDP's buckets up
    def forget():
        for kind in seen.values():
            kind.clear()

    with (
        mock.patch.object(dist, "all_reduce", all_reduce),
        mock.patch.object(dist, "_broadcast_coalesced", broadcast_coalesced),
    ):
        trainer.run()
    return seen


def one_rank(rank, folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{folder}/store", rank=rank, world_size=2)
    seen = {name: watch(settings, folder) for name, settings in CASES.items()}
    (Path(folder) / f"{rank}.json").write_text(json.dumps(seen))
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def exchanged(tmp_path_factory):
    """What the first of two ranks sent in a step, for each of CASES."""
    folder = tmp_path_factory.mktemp("ranks")
    torch.multiprocessing.spawn(one_rank, (str(folder),), nprocs=2)
    first, second = (json.loads((folder / f"{rank}.json").read_text()) for rank in (0, 1))
    assert first == second
    return first


def quick(**settings):
    parser = model.configuration("ViT-B", **QUICK, **settings)
    return parser, model.shapes(parser)


@pytest.mark.parametrize("case", list(CASES))
def test_every_exchange_of_the_real_step_is_counted(exchanged, case):
    settings = dict(CASES[case])
    batches = settings.pop("accumulation_steps", 1)
    found = model.collectives(*quick(**settings))
    plain = Counter()
    for one in found:
        if not one.hidden:
            plain[one.size] += one.calls * (1 if one.once else batches)
    (log,) = (one.size for one in found if one.name == "losses and gradient norm")
    plain[log] -= batches - 1  # the norm is known with the last batch
    plain[log - model.FLOAT] += batches - 1
    assert +plain == Counter(exchanged[case]["reduced"])
    assert exchanged[case]["buffers"] == []
    gradients = sum(one.calls * one.size for one in found if one.hidden)
    assert gradients == sum(exchanged[case]["gradients"])


def test_the_papers_step_waits_for_sinkhorn_figures_flag_and_centres(exchanged):
    """2 sides of (maximum, tokens, 10 iterations), one stack of figures, one flag, two centres."""
    assert len(exchanged["paper"]["reduced"]) == 2 * 12 + 1 + 1 + 2


def test_gradients_cross_once_per_optimiser_step(exchanged):
    once = sum(exchanged["paper"]["gradients"])
    assert sum(exchanged["accumulated"]["gradients"]) == once


def test_sizes_on_paper_are_those_of_the_real_networks():
    trainer, _ = build("S", quick=True)
    parser = model.configuration("ViT-S", **QUICK)
    network = model.shapes(parser)
    real = {n: (p.shape, p.requires_grad) for n, p in trainer.network.named_parameters()}
    assert real == {n: (p.shape, p.requires_grad) for n, p in network.named_parameters()}
    assert all(p.is_meta for p in network.parameters())
    state = 4 * sum(p.numel() for p in trainer.network.parameters() if p.requires_grad)
    assert model.memory(network, 8, sharded=False).gradients == state


@pytest.mark.parametrize(
    ("size", "encoder"), [("ViT-S", 22), ("ViT-B", 86), ("ViT-L", 304), ("ViT-H", 632)]
)
def test_encoders_have_their_published_sizes(size, encoder):
    """Millions of parameters, of ViT-H in Dosovitskiy et al.'s table; patches differ a little."""
    network = model.shapes(model.configuration(size))
    millions = sum(p.numel() for p in network.video.student.parameters()) / 1e6
    assert millions == pytest.approx(encoder, rel=0.03)
    assert model.trained(network) / 1e6 > 2 * encoder * 0.97


@pytest.mark.parametrize(
    ("gpus", "latency", "bandwidth"), [(2, 2, 6.4), (8, 6, 6.4), (16, 6 + 20, 1.6), (64, 66, 1.6)]
)
def test_a_fabric_by_hand(gpus, latency, bandwidth):
    assert SLOW.latency(gpus) == pytest.approx(latency + model.LAUNCH)
    moved = 2 * (gpus - 1) / gpus * 100
    expected = latency + model.LAUNCH + moved / bandwidth
    assert SLOW.seconds(100, gpus) == pytest.approx(expected)
    assert SLOW.seconds(100, 1) == 0


def test_waiting_by_hand():
    """Gradients hide behind backward, but for the last bucket; all else is waited for."""
    gradients = model.Collective("gradients", 4, 32, hidden=True)
    flag = model.Collective("flag", 3, 0)
    one = SLOW.seconds(32, 8)
    work = model.Compute(step=100.0, backward=4 * one - 10)
    added = model.waiting([gradients, flag], work, SLOW, 8)
    assert added == {"gradients": pytest.approx(one), "flag": pytest.approx(3 * SLOW.latency(8))}
    short = model.Compute(step=100.0, backward=1.0)
    assert model.waiting([gradients], short, SLOW, 8)["gradients"] == pytest.approx(4 * one - 1)
    share = model.efficiency([gradients], short, SLOW, 8)
    assert share == pytest.approx(100 / (100 + 4 * one - 1))
    once = dataclasses.replace(gradients, once=True)
    share = model.efficiency([once, flag], short, SLOW, 8, batches=5)
    lost = 4 * one - 1 + 5 * 3 * SLOW.latency(8)
    assert share == pytest.approx(500 / (500 + lost))


@given(
    gpus=st.integers(1, 4096),
    size=st.integers(0, 2**34),
    backward=st.floats(0, 10),
    calls=st.integers(1, 100),
)
def test_more_gpus_and_slower_links_never_help(gpus, size, backward, calls):
    work = model.Compute(step=backward + 0.1, backward=backward)
    fast, slow = model.FABRICS
    sent = [model.Collective("a", calls, size, hidden=True), model.Collective("b", calls, 4)]
    here = model.efficiency(sent, work, fast, gpus)
    assert 0 < here <= 1
    assert (here == 1) == (gpus == 1)
    assert model.efficiency(sent, work, fast, 2 * gpus) <= here
    assert model.efficiency(sent, work, slow, gpus) <= here


def test_memory_of_ddp_and_of_shards():
    network = model.shapes(model.configuration("ViT-B"))
    whole, sharded = (model.memory(network, 8, sharded=s) for s in (False, True))
    learn = 4 * model.trained(network)
    assert (whole.parameters, whole.gradients, whole.moments) == (learn, learn, 2 * learn)
    everything = 4 * sum(p.numel() for p in network.parameters())
    assert whole.parameters + whole.teachers == everything
    assert sharded.total - sharded.whole == pytest.approx((everything + 3 * learn) / 8)
    heads = sum(
        4 * p.numel() * (2 if p.requires_grad else 1)
        for name, p in network.named_parameters()
        if "head" in name
    )
    block = 4 * sum(p.numel() for p in network.video.student.blocks[0].parameters())
    assert heads + 2 * block < sharded.whole < 1.2 * (heads + 2 * block)


def test_the_page_holds_what_the_script_prints():
    page = (ROOT / "docs" / "scaling.md").read_text()
    assert page.count(begin("speed/scaling.py")) == 1
    held = page.partition(begin("speed/scaling.py"))[2].partition(END)[0].strip()
    assert held == scaling.report(48, 990e12, 0.45, [8, 64, 512])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--utilisation", "45"], "--batch from 1, --peak above 0, --utilisation in (0, 1]"),
        (["--gpus", "0"], "--gpus 0: from 1"),
    ],
)
def test_nonsense_is_refused(arguments, message, capsys):
    with mock.patch("sys.argv", ["scaling.py", *arguments]), pytest.raises(SystemExit):
        scaling.main()
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("size", "text"),
    [(0, "0 B"), (999, "999 B"), (12_000, "12 kB"), (999_600, "1.0 MB"), (903_168_000, "903 MB")],
)
def test_amounts(size, text):
    assert scaling.amount(size) == text


@pytest.mark.parametrize(("gpus", "batches"), [(1, 3), (9, 4), (90, 22)])
def test_validation_is_shared_but_for_the_rest(gpus, batches):
    """A ninth of 20 steps' clips: 2 global batches and 2/9, which every rank takes."""
    parser, _ = quick(val_fraction=0.1, val_interval=10)
    work = model.Compute(step=1.0, backward=0.4)
    expected = batches * 0.6 / (10 * 20)
    assert scaling.validation(parser, work, 9, gpus) == pytest.approx(expected)


def test_a_checkpoint_and_scores_take_what_is_counted(tmp_path):
    trainer, batch = build("B", quick=True)
    step(trainer, batch)
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(trainer, checkpoints.last)
    parser, network = quick()
    buffers = sum(b.nbytes for b in trainer.network.state_dict().values()) - 4 * sum(
        p.numel() for p in trainer.network.parameters()
    )
    expected = scaling.saved(network) + buffers
    assert expected < checkpoints.last.stat().st_size < 1.2 * expected
    with mock.patch.object(clustering, "sinkhorn", wraps=clustering.sinkhorn) as balanced:
        step(trainer, batch)
    sides = [4 * call.args[0].numel() for call in balanced.call_args_list]
    assert sides == 2 * [scaling.scores(parser, network, len(batch["image"]))]
