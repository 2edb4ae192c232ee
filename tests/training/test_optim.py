from __future__ import annotations

import copy

import torch

from discovr_monai.training.optim import parameter_groups
from tests.conftest import tiny_network


def fitted(fused, steps, state=None, network=None):
    """AdamW after some steps on fixed gradients, in float64."""
    torch.manual_seed(0)
    network = network or tiny_network().double()
    groups = parameter_groups(network)
    if not fused:
        groups = [{k: v for k, v in group.items() if k != "fused"} for group in groups]
    optimizer = torch.optim.AdamW(groups, lr=1e-2, betas=(0.9, 0.95))
    if state is not None:
        optimizer.load_state_dict(state)
    generator = torch.Generator().manual_seed(1)
    for _ in range(steps):
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                shape, dtype = parameter.shape, torch.float64
                parameter.grad = torch.randn(shape, generator=generator, dtype=dtype)
        optimizer.step()
    return network, optimizer


def test_the_fused_update_is_adamw():
    ours, theirs = fitted(True, 5)[0], fitted(False, 5)[0]
    start = fitted(True, 0)[0]
    for name, value in ours.named_parameters():
        torch.testing.assert_close(value, theirs.get_parameter(name), rtol=1e-10, atol=1e-12)
        if value.requires_grad:
            assert not torch.equal(value, start.get_parameter(name))


def test_a_state_saved_without_it_goes_on_unchanged():
    """A training begun before resumes with the update that it began with, bit for bit."""
    network, optimizer = fitted(False, 2)
    other, state = copy.deepcopy(network), copy.deepcopy(optimizer.state_dict())
    fitted(False, 2, optimizer.state_dict(), network)
    _, resumed = fitted(True, 2, state, other)
    assert not any(group["fused"] for group in resumed.param_groups)
    for name, value in other.named_parameters():
        assert torch.equal(value, network.get_parameter(name)), name
