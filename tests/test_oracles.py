"""What no rebuilding may change: names in checkpoints, the step's figures, what one can type."""

from __future__ import annotations

import json
from importlib import import_module

import pytest
import torch

from tests.oracles.__main__ import EXPECTED, STEPS, differences
from tests.oracles.commands import config_targets, help_of_all_commands
from tests.oracles.training import PRESETS, digest, five_steps, parsed, shapes_of

EXPECT = json.loads(EXPECTED.read_text())


@pytest.mark.parametrize("preset", PRESETS)
def test_names_and_shapes_of_the_state_dict(preset):
    assert digest(shapes_of(preset)) == EXPECT["state_dicts"][preset or "train"]


def test_names_of_the_demo_one_by_one():
    assert not differences(EXPECT["names"]["train"], shapes_of(""))


@pytest.mark.parametrize("name", STEPS)
def test_five_steps_in_float64(name):
    """Losses, gradients and teachers to 1e-12: the order of sums may change, nothing else."""
    assert not differences(EXPECT["steps"][name], five_steps(STEPS[name]))


FIRST_WEIGHTS = {  # sums of absolute values; another order of building would draw others
    "prototypes": 2319.308752,
    "video_student.cls_token": 1.945796,
    "video_head.mlp.0.weight": 1043.12046,
    "image_head.mlp.0.weight": 1046.194626,
    "decoder.embed.weight": 196.408683,
}


def test_a_seed_gives_the_same_first_weights():
    torch.manual_seed(0)
    state = parsed("").get_parsed_content("network_def").state_dict()
    sums = {name: float(state[name].double().abs().sum()) for name in FIRST_WEIGHTS}
    assert sums == pytest.approx(FIRST_WEIGHTS, rel=1e-4)  # one kind of CPU rounds as another


def test_a_difference_is_seen():
    """The comparison itself can fail: a figure in the 11th digit, a name, a length."""
    steps = EXPECT["steps"]["demo"]
    for changed in (
        steps | {"losses": [{**loss, "video": loss["video"] + 1e-11} for loss in steps["losses"]]},
        steps | {"gradients": dict(list(steps["gradients"].items())[1:])},
        steps | {"losses": steps["losses"][:4]},
    ):
        assert differences(steps, changed)


def test_every_commands_help():
    assert not differences(EXPECT["help"], help_of_all_commands())


@pytest.mark.parametrize(("config", "names"), config_targets().items())
def test_what_configs_name_is_there(config, names):
    for name in names:
        module, _, rest = name.partition(".")
        found = import_module(module)
        for part in rest.split("."):
            try:
                found = getattr(found, part)
            except AttributeError:
                module = f"{found.__name__}.{part}"
                found = import_module(module)
