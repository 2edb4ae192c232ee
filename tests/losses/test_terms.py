from __future__ import annotations

import math

import pytest
import torch

from discovr_monai.base.schedules import LinearRamp
from discovr_monai.base.types import DiscovrOutput
from discovr_monai.losses import cross_entropy
from discovr_monai.losses.clustering import ClusterDistillation
from discovr_monai.losses.cross_entropy import soft_cross_entropy
from discovr_monai.losses.distillation import SelfDistillation
from discovr_monai.losses.objective import Objective
from discovr_monai.losses.reconstruction import PixelReconstruction
from discovr_monai.losses.sinkhorn import sinkhorn
from tests.conftest import tiny_objective
from tests.networks.test_discovr import masks_for


class Reads(torch.nn.Module):
    def __init__(self, *needs):
        super().__init__()
        self.needs = needs


def test_a_term_belongs_to_the_branch_whose_fields_it_reads():
    terms = {
        "frames": SelfDistillation("image"),  # whatever its name is
        "video": SelfDistillation("video"),
        "cluster": ClusterDistillation(),
        "own": Reads("image_cls"),
        "targets": Reads("target_tokens", "video_cls"),  # what trains nothing may be read
    }
    assert Objective(terms).branches == {
        "frames": "image", "video": "video", "cluster": "video", "own": "image",
        "targets": "video",
    }  # fmt: skip


def test_a_term_that_would_train_both_branches_is_refused():
    with pytest.raises(ValueError, match="'both' reads image_cls, which train the image branch"):
        Objective({"both": Reads("image_cls", "video_cls")})


def test_the_terms_of_a_branch_alone(network, clip):
    objective, output = tiny_objective(), network(clip, *masks_for(network))
    losses = objective(output)
    image, video = (objective(output, 0, branch) for branch in ("image", "video"))
    assert image.keys() == {"loss", "image"} and video.keys() == {"loss", "video", "cluster"}
    torch.testing.assert_close(image["loss"] + video["loss"], losses["loss"])
    assert Objective({"video": SelfDistillation("video")})(output, 0, "image") == {}


def random_output(**fields) -> DiscovrOutput:
    torch.manual_seed(0)
    return DiscovrOutput(
        video_logits=torch.randn(2, 3, 5, requires_grad=True),
        video_teacher_logits=torch.randn(3, 5),
        video_centre=torch.randn(1, 5),
        video_scores=torch.randn(2, 4, 6).tanh().requires_grad_(),
        target_scores=torch.randn(2, 4, 6).tanh().requires_grad_(),
        **fields,
    )


def test_self_distillation_restated():
    out = random_output()
    found = SelfDistillation("video", teacher_temperature=0.05)(out)
    total = 0.0
    p = ((out.video_teacher_logits - out.video_centre) / 0.05).double().softmax(-1)
    for view in out.video_logits.double():
        q = (view / 0.1).softmax(-1)
        total -= (p * q.log()).sum(-1).mean() / len(out.video_logits)
    assert float(found) == pytest.approx(float(total), rel=1e-5)


def test_the_temperature_follows_the_step():
    term = SelfDistillation("video", teacher_temperature=LinearRamp(0.04, 0.07, 10))
    assert term.temperature(5) == pytest.approx(0.055)
    out = random_output()
    assert float(term(out, 0)) != float(term(out, 10))


def test_a_constant_teacher_is_centred_away():
    """Logits equal to the centre say nothing: the target is uniform."""
    out = random_output()
    out.video_teacher_logits = out.video_centre.expand(3, -1)
    p = SelfDistillation("video").teacher_probabilities(out, 0)
    torch.testing.assert_close(p, torch.full((3, 5), 0.2))


def test_sinkhorn_centring_balances_the_teacher():
    out = random_output()
    out.video_teacher_logits = torch.randn(40, 5) * 0.05 + torch.tensor([1.0, 0, 0, 0, 0])
    p = SelfDistillation("video", centring="sinkhorn").teacher_probabilities(out, 0)
    torch.testing.assert_close(p.sum(1), torch.ones(40))
    assert float(p.sum(0).max()) < 16  # a softmax would give nearly 40 to the first output
    assert float(out.video_teacher_logits.div(0.04).softmax(-1).sum(0).max()) > 35


def test_gradient_reaches_the_student_only():
    out = random_output()
    out.video_teacher_logits.requires_grad_()
    SelfDistillation("video")(out).backward()
    assert out.video_logits.grad is not None
    assert out.video_teacher_logits.grad is None


@pytest.mark.parametrize("piece", [1, 40, 10**6])
@pytest.mark.parametrize("views", [(), (3,)])
def test_cross_entropy_and_its_gradient_restated(piece, views, monkeypatch):
    """However few rows are worked on at a time, and whatever multiplies the loss."""
    monkeypatch.setitem(cross_entropy.PIECE, "cpu", piece)
    torch.manual_seed(0)
    logits = torch.randn(*views, 7, 11, dtype=torch.float64, requires_grad=True)
    target = torch.randn(7, 11, dtype=torch.float64).softmax(-1)
    found = soft_cross_entropy(logits, target, 0.3)
    expected = -(target * (logits / 0.3).log_softmax(-1)).sum(-1).mean()
    torch.testing.assert_close(found, expected)
    gradients = [torch.autograd.grad(2.5 * loss, logits)[0] for loss in (found, expected)]
    torch.testing.assert_close(*gradients, rtol=1e-12, atol=1e-15)


def test_cross_entropy_keeps_one_array_of_the_logits_type():
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        logits = torch.randn(6, 9, dtype=torch.bfloat16, requires_grad=True)
        loss = soft_cross_entropy(logits, torch.full((6, 9), 1 / 9), 0.1)
        assert [(t.shape, t.dtype) for t in kept] == [(logits.shape, torch.bfloat16)]
        with torch.no_grad():
            again = soft_cross_entropy(logits, torch.full((6, 9), 1 / 9), 0.1)
    assert len(kept) == 1  # nothing where no gradient is asked for
    assert float(again) == float(loss)
    assert loss.dtype == torch.float32


@pytest.mark.parametrize("assignments", ["soft", "hard"])
def test_cluster_distillation_restated(assignments):
    out = random_output()
    found = ClusterDistillation(assignments=assignments)(out)
    s_v, s_i = (s.detach().flatten(0, 1) for s in (out.video_scores, out.target_scores))
    q_v, q_i = sinkhorn(s_v), sinkhorn(s_i)
    if assignments == "hard":
        q_v, q_i = ((q == q.amax(1, keepdim=True)).float() for q in (q_v, q_i))
    expected = -(q_i * (s_v / 0.1).log_softmax(1)).sum(1).mean()
    expected -= (q_v * (s_i / 0.1).log_softmax(1)).sum(1).mean()
    assert float(found) == pytest.approx(float(expected), rel=1e-5)


def test_assignments_take_no_gradient():
    out = random_output()
    loss = ClusterDistillation()(out)
    gradient = torch.autograd.grad(loss, out.video_scores)[0]
    s = out.video_scores.detach().flatten(0, 1).requires_grad_()
    q = sinkhorn(out.target_scores.detach().flatten(0, 1))
    loss = -(q * (s / 0.1).log_softmax(1)).sum(1).mean()
    expected = torch.autograd.grad(loss, s)[0]
    torch.testing.assert_close(gradient.flatten(0, 1), expected)


def test_reconstruction_counts_masked_tokens_only():
    mask = torch.tensor([[True, False]])
    target = torch.randn(1, 2, 12)
    out = DiscovrOutput(pixels=target.clone(), pixel_targets=target, global_mask=mask)
    term = PixelReconstruction(normalise=False)
    assert float(term(out)) == 0
    out.pixels[0, 1] += 5
    assert float(term(out)) == 0
    out.pixels[0, 0] += 2
    assert float(term(out)) == pytest.approx(4, rel=1e-5)


def test_normalised_reconstruction_ignores_gain():
    mask = torch.ones(1, 2, dtype=torch.bool)
    target = torch.randn(1, 2, 12)
    pixels = torch.randn(1, 2, 12)
    losses = [
        float(
            PixelReconstruction()(DiscovrOutput(pixels=pixels, pixel_targets=t, global_mask=mask))
        )
        for t in (target, target * 7 + 3)
    ]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


def test_objective_weighs_and_skips():
    terms = {"video": SelfDistillation("video"), "image": SelfDistillation("image"),
             "cluster": ClusterDistillation()}  # fmt: skip
    losses = Objective(terms, {"image": 0, "cluster": 0.5})(random_output())
    assert set(losses) == {"loss", "video", "cluster"}
    assert float(losses["loss"]) == pytest.approx(float(losses["video"] + 0.5 * losses["cluster"]))


def test_objective_says_what_is_missing():
    with pytest.raises(ValueError, match="gives no pixel_targets, pixels, which .* weight to 0"):
        Objective({"pixels": PixelReconstruction()})(
            DiscovrOutput(global_mask=torch.ones(1, 1, dtype=torch.bool))
        )


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (
            lambda: Objective({"a": SelfDistillation("video")}, {"b": 1}),
            "unknown terms \\['b'\\]; have \\['a'\\]",
        ),
        (
            lambda: Objective({"a": SelfDistillation("video")}, {"a": 0}),
            "no term of non-zero weight",
        ),
        (lambda: SelfDistillation("audio"), "branch 'audio' must be"),
        (lambda: SelfDistillation("video", centring="mean"), "centring 'mean' must be"),
        (lambda: ClusterDistillation(assignments="firm"), "assignments 'firm' must be"),
    ],
)
def test_senseless_options_are_refused(build, message):
    with pytest.raises(ValueError, match=message):
        build()


def test_a_uniform_student_pays_the_logarithm_of_the_outputs():
    out = random_output()
    out.video_logits = torch.zeros(2, 3, 5)
    assert float(SelfDistillation("video")(out)) == pytest.approx(math.log(5), rel=1e-5)
