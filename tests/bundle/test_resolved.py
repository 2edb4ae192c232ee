"""The configs build what they built before they were written anew (tests/bundle/resolved.py)."""

from __future__ import annotations

import json

import pytest

from tests.bundle.resolved import EVALUATIONS, OVERLAYS, SNAPSHOT, everything

BEFORE = json.loads(SNAPSHOT.read_text())
# what differs, and why
CHUNK = "train#trainer.objective.terms.cluster.chunk"  # the option is gone
RECORDED = (
    "train#trainer.train_handlers.3.parameters"  # no list any more: tests/bundle/test_configs.py
)
START = "$[discovr_monai.base.distributed.start(), {}]"  # several processes: in front of the rest


@pytest.fixture(scope="module")
def now():
    return everything()


@pytest.mark.parametrize("name", BEFORE)
def test_every_component_is_as_before(name, now):
    before, after = dict(BEFORE[name]), dict(now[name])
    if name == "multi_gpu_train":
        before |= {"initialize.0": START.format(before["initialize.1"].removeprefix("$"))}
        for place in ("initialize.1", "initialize.2", "initialize.3"):
            del before[place]
    before, after = (
        {way: value for way, value in side.items() if way != CHUNK and not way.startswith(RECORDED)}
        for side in (before, after)
    )
    assert after == before


def test_the_record_holds_every_config():
    assert BEFORE.keys() == {"train", "inference", *OVERLAYS, *EVALUATIONS}
    assert len(BEFORE["train"]) > 200
    assert BEFORE["paper"]["train#trainer.gradient_clip"] is None
