"""The image branch's backward inside the forward: the same result, and its memory is free sooner."""

from __future__ import annotations

import copy
import weakref
from functools import partial

import pytest
import torch
from torch import nn

from discovr_monai.losses.distillation import SelfDistillation
from discovr_monai.losses.objective import Objective
from discovr_monai.networks.early import early_backward
from discovr_monai.networks.parallel import accelerate
from tests.conftest import tiny_network, tiny_objective
from tests.networks.test_discovr import masks_for


def moved_network():
    """No weight at its start of zero."""
    torch.manual_seed(0)
    network = tiny_network()
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return network


def run(network, objective, clip, dtype, early):
    image = partial(objective.terms["image"], step=3) if early else None
    with torch.autocast("cpu", dtype=dtype, enabled=dtype is not None):
        output = network(clip, *masks_for(network), image_loss=image)
    losses = objective(output, 3)
    (losses["loss"] / 2).backward()
    gradients = {n: p.grad for n, p in network.named_parameters() if p.grad is not None}
    return output, losses, gradients


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("centring", ["centre", "sinkhorn"])
def test_losses_and_gradients_are_the_same_to_the_last_bit(clip, dtype, recompute, centring):
    terms = dict(tiny_objective().terms) | {"image": SelfDistillation("image", centring=centring)}
    objective = Objective(terms, {"image": 0.5, "video": 2.0})  # factors that round nothing
    late = accelerate(moved_network(), activation_checkpointing=recompute)
    early = copy.deepcopy(late)
    _, expected, gradients = run(late, objective, clip, dtype, early=False)
    output, losses, found = run(early, objective, clip, dtype, early=True)
    assert gradients.keys() == found.keys()
    assert gradients.keys() == {n for n, p in late.named_parameters() if p.requires_grad}
    for ours, theirs in ((losses, expected), (found, gradients)):
        for name, value in theirs.items():
            assert torch.equal(ours[name], value), name
    assert not output.image_logits.requires_grad  # what would be lost in silence


def test_the_image_branch_is_forgotten_before_the_video_branch_begins(clip):
    alive = {}
    for early in (False, True):
        network, first = moved_network(), []
        network.image_student.blocks[0].register_forward_hook(
            lambda _, x, y, first=first: first.append(weakref.ref(y))
        )

        def look(*_, first=first, early=early):
            alive.setdefault(early, first[0]() is not None)

        network.video_student.blocks[0].register_forward_pre_hook(look)
        run(network, tiny_objective(), clip, None, early=early)
    assert alive == {False: True, True: False}


def test_gradients_of_the_image_branch_come_first_so_that_they_can_cross_ranks_meanwhile(clip):
    network, order = moved_network(), []
    for name, parameter in network.named_parameters():
        if parameter.requires_grad:
            part = name.partition("_")[0]
            parameter.register_post_accumulate_grad_hook(lambda _, part=part: order.append(part))
    run(network, tiny_objective(), clip, None, early=True)
    last = max(i for i, part in enumerate(order) if part == "image")
    others = [part for part in order[:last] if part != "image"]
    assert len(others) <= 1  # the prototypes, whose products are the loss's own
    assert "video" in order[last:]


def test_nothing_is_early_without_gradient(clip):
    objective = tiny_objective()
    network = moved_network()
    with torch.no_grad():
        output = network(clip, *masks_for(network), image_loss=objective.terms["image"])
    assert output.image_loss is None
    assert torch.isfinite(objective(output)["image"])


def test_parameters_that_rest_stay_out_and_gradients_arrive_once_and_scaled():
    layer, seen = nn.Linear(3, 2).double(), []
    layer.bias.requires_grad_(False)
    layer.weight.register_post_accumulate_grad_hook(lambda p: seen.append(p.grad))  # as DDP's
    x = torch.randn(4, 3, dtype=torch.float64)
    loss = early_backward(lambda: layer(x).square().sum(), layer.parameters())()
    assert layer.weight.grad is None
    assert not seen
    (3 * loss).backward()
    expected = 3 * 2 * layer(x).T @ x
    torch.testing.assert_close(layer.weight.grad, expected)
    assert len(seen) == 1
    assert layer.bias.grad is None


def test_what_the_loss_does_not_use_and_what_does_not_train_gets_nothing():
    used, idle = nn.Linear(3, 2), nn.Linear(3, 2)
    x = torch.randn(4, 3)
    parameters = [*used.parameters(), *idle.parameters()]
    early_backward(lambda: used(x).sum().reshape(1), parameters)().backward()  # of one entry
    assert used.weight.grad is not None and idle.weight.grad is None
    used.requires_grad_(False)
    assert not early_backward(lambda: used(x).sum(), used.parameters())().requires_grad


def test_a_second_backward_is_refused():
    layer = nn.Linear(3, 2)
    loss = early_backward(lambda: layer(torch.ones(1, 3)).sum(), layer.parameters())()
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="cannot come twice"):
        loss.backward()


def test_parameters_with_hooks_are_trained_late(clip):
    network = moved_network()
    network.image_student.cls_token.register_hook(lambda g: 0.1 * g)
    output, _, found = run(network, tiny_objective(), clip, None, early=True)
    assert output.image_loss is None
    _, _, expected = run(moved_network(), tiny_objective(), clip, None, early=False)
    torch.testing.assert_close(
        found["image_student.cls_token"], 0.1 * expected["image_student.cls_token"]
    )
