"""n ranks with a batch of B / n are one rank with a batch of B, over 20 steps."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from discovr_monai.weights.files import read_checkpoint
from tests.commands import run_module
from tests.conftest import WIDTH

ROOT = Path(__file__).parents[2]
# relative to each tensor's largest number; 20 steps of AdamW amplify float32's rounding
TOLERANCE = {"float64": 1e-9, "accumulated": 1e-9, "batch_norm": 1e-9, "float32": 2e-3,
             "sharded": 1e-9, "sharded_accumulated": 1e-9}  # fmt: skip
ALONE = {"sharded": "float64", "sharded_accumulated": "accumulated"}  # what it must equal
# float32 rounds each number by a share of 2^-24. A gradient is a sum over clips, views and tokens
# (8 x 5 x 33), which ranks bring together in another order; a score is a sum over the width, and
# Sinkhorn divides it by eps.
ROUNDING = 2.0**-24
FIRST_GRADIENTS = {"float32": 8 * 5 * 33 * ROUNDING}
ASSIGNMENTS = {"float32": WIDTH / 0.05 * ROUNDING}
BATCHES = {"accumulated": 50}  # of 10 epochs; the others have 20


def ranks_of(ranks: int, *arguments: str) -> str:
    """What the ranks printed."""
    done = run_module("tests.distributed.worker", *arguments, cwd=ROOT, ranks=ranks, timeout=900)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout + done.stderr


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """{ranks: what they printed}, and the folder with what they found."""
    out = tmp_path_factory.mktemp("runs")
    alone = [name for name in TOLERANCE if name not in ALONE]
    printed = {r: ranks_of(r, str(out), *TOLERANCE) for r in (2, 4)}
    return printed | {1: ranks_of(1, str(out), *alone)}, out


def load(out: Path, name: str, ranks: int) -> list[dict]:
    return [torch.load(out / f"{name}-{ranks}-{r}.pt", weights_only=True) for r in range(ranks)]


def apart(a: torch.Tensor, b: torch.Tensor) -> float:
    """The largest difference, relative to b's largest number, or to 0.1 where all are smaller."""
    assert a.shape == b.shape
    return float((a - b).abs().max() / b.abs().max().clamp_min(0.1))


@pytest.mark.parametrize("ranks", [2, 4])
@pytest.mark.parametrize("name", list(TOLERANCE))
def test_ranks_equal_one_process(runs, name, ranks):
    out, limit = runs[1], TOLERANCE[name]
    reference = ALONE.get(name, name)
    (alone,), together = load(out, reference, 1), load(out, name, ranks)
    assert len(alone["losses"]) == BATCHES.get(reference, 20)
    for found in together:
        assert apart(found["losses"], alone["losses"]) < limit
        assert found["state"].keys() == alone["state"].keys()
        for key in alone["state"]:  # weights, prototypes, teachers, centres
            assert apart(found["state"][key], alone["state"][key]) < limit, key
        for when in ("first_gradients", "gradients"):
            assert found[when].keys() == alone[when].keys()
    for key, gradient in alone["first_gradients"].items():
        difference = apart(together[0]["first_gradients"][key], gradient)
        assert difference < FIRST_GRADIENTS.get(name, 1e-11), key
    moved = max(
        float(
            (alone["state"][f"video_student.{k}"] - alone["state"][f"video_teacher.{k}"])
            .abs()
            .max()
        )
        for k in ("cls_token", "norm.weight")
    )
    assert moved > 1e-4  # 20 steps that did something


@pytest.mark.parametrize("ranks", [2, 4])
@pytest.mark.parametrize("name", ["float64", "float32", "batch_norm"])
def test_sinkhorn_assigns_as_over_the_global_batch(runs, name, ranks):
    """Row for row, each rank's share of what one process assigns."""
    (alone,), together = load(runs[1], name, 1), load(runs[1], name, ranks)
    for side in (0, 1):
        joined = torch.cat([found["assignments"][side] for found in together])
        assert apart(joined, alone["assignments"][side]) < ASSIGNMENTS.get(name, 1e-12)


def test_a_sharded_checkpoint_goes_on_with_another_number_of_ranks(runs, tmp_path):
    """5 epochs on 2 ranks, 5 on 4: as 10 on one. The folder is also read whole, by one process."""
    ranks_of(2, str(tmp_path), "sharded:5")
    halfway = load(tmp_path, "sharded", 2)[0]["state"]
    found = read_checkpoint(tmp_path / "sharded" / "last")
    assert found["network"].keys() == halfway.keys()
    assert all(torch.equal(found["network"][key], halfway[key]) for key in halfway)
    files = list((tmp_path / "sharded" / "last").iterdir())
    assert sum(f.suffix == ".safetensors" for f in files) == 2
    assert "Resuming after 5 epochs and 0 batches" in ranks_of(4, str(tmp_path), "sharded:10")
    (alone,) = load(runs[1], "float64", 1)
    for part in load(tmp_path, "sharded", 4):
        for key, value in part["state"].items():
            assert apart(value, alone["state"][key]) < 1e-9, key


def test_nothing_is_warned_of(runs):
    for ranks, printed in runs[0].items():
        assert not printed.strip(), (ranks, printed)
