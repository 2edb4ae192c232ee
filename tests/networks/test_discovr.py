from __future__ import annotations

import copy
import dataclasses
import weakref

import pytest
import torch

from discovr_monai.networks.discovr import PARTS
from discovr_monai.networks.ema import ema_update, make_teacher
from discovr_monai.networks.masking import TubeMasking, visible_tokens
from tests.conftest import tiny_encoder, tiny_network, tiny_objective
from tests.training.test_trainer import trainer


def masks_for(network, batch=3, step=0, views=4):
    return TubeMasking(views, 0.7)(
        step,
        range(batch),
        video_grid=network.video.student.grid,
        image_grid=network.image.student.grid if network.image and network.image.head else None,
        frames=len(network.image.student_frames) if network.image else 0,
    )


def gradients(network, loss):
    network.zero_grad(set_to_none=True)
    loss.backward()
    state = network.state_dict(keep_vars=True)
    return {n: p.grad for n, p in state.items() if p.grad is not None}


def test_a_teacher_that_sees_a_part_changes_its_own_answer_only(network, clip):
    video, image, _ = masks_for(network)
    hidden = visible_tokens(torch.rand(3, 32, generator=torch.Generator().manual_seed(0)), 12)
    whole = network(clip, video, image)
    part = network(clip, video, image, hidden)
    cls = network.video.teacher(clip, hidden)[:, 0]  # of 12 tokens
    torch.testing.assert_close(part.video_teacher_logits, network.video.teacher_head(cls))
    assert not torch.equal(part.video_teacher_logits, whole.video_teacher_logits)
    assert not torch.equal(part.video_cls[-1], whole.video_cls[-1])
    for name in ("video_logits", "image_logits", "image_teacher_logits", "video_scores",
                 "target_scores", "image_cls"):  # fmt: skip
        assert torch.equal(getattr(part, name), getattr(whole, name)), name


def test_output_shapes(network, clip):
    out = network(clip, *masks_for(network))
    assert out.video_logits.shape == (4, 3, 20)
    assert out.video_teacher_logits.shape == (3, 20)
    assert out.image_logits.shape == (4, 12, 20)
    assert out.image_teacher_logits.shape == (12, 20)
    assert out.video_scores.shape == out.target_scores.shape == (3, 32, 10)
    assert out.video_cls.shape == (5, 3, 24)
    assert out.video_scores.abs().max() <= 1 + 1e-5


def test_scd_reaches_prototypes_decoder_and_video_encoder_never_the_image_branch(network, clip):
    out = network(clip, *masks_for(network))
    found = gradients(network, tiny_objective().terms["cluster"](out))
    assert not [n for n in found if n.startswith("image")]
    for part in ("prototypes", "decoder.", "video_student."):
        assert sum(float(g.abs().sum()) for n, g in found.items() if n.startswith(part)) > 0


def test_each_side_of_scd_moves_the_prototypes(network, clip):
    out = network(clip, *masks_for(network))
    for field in ("video_scores", "target_scores"):
        found = gradients(network, getattr(out, field).square().sum())
        assert float(found["prototypes"].abs().sum()) > 0
        out = network(clip, *masks_for(network))


@pytest.mark.parametrize("order", ["space", "time"])
def test_scd_speaks_of_the_same_place_and_time(network, clip, order):
    """Permuting the target's space or time order changes the loss."""
    term = tiny_objective().terms["cluster"]
    out = network(clip, *masks_for(network))
    target = out.target_scores.unflatten(1, (2, 16))
    moved = target.flip(2) if order == "space" else target.flip(1)
    other = dataclasses.replace(out, target_scores=moved.flatten(1, 2))
    assert abs(term(out).item() - term(other).item()) > 1e-5


def test_target_tokens_are_of_every_second_frame_in_raster_order(network, clip):
    """Changing frame 2 changes exactly the target tokens of tubelet 1; frame 3 changes none."""
    network.eval()
    masks = masks_for(network)
    base = network(clip, *masks).target_scores.unflatten(1, (2, 16))
    for frame, changed in ((0, [True, False]), (2, [False, True]), (3, [False, False])):
        other = clip.clone()
        other[:, :, frame] += torch.randn(3, 3, 16, 16)
        moved = network(other, *masks).target_scores.unflatten(1, (2, 16))
        assert [not torch.equal(moved[:, t], base[:, t]) for t in range(2)] == changed


def test_a_place_of_the_target_is_where_the_frame_changed(clip):
    """With attention off the image teacher is local: token (h, w) follows patch (h, w)."""
    torch.manual_seed(0)
    network = tiny_network(image=tiny_encoder(1, 1, depth=0))
    base = network.image(clip, masks_for(network).image).target_tokens
    torch.testing.assert_close(network.image.target_tokens(clip), base)
    other = clip.clone()
    other[:, :, 2, 4:8, 8:12] += 5  # tubelet 1, row 1, column 2
    moved = network.image.target_tokens(other)
    distance = (moved - base).norm(dim=-1)[0]
    assert int(distance.argmax()) == (1 * 4 + 1) * 4 + 2


def test_decoder_output_is_local_to_its_mask(network, clip):
    """Visible places of the decoder's input carry that place's token."""
    video_masks, image_masks, _ = masks_for(network)
    out = network(clip, video_masks, image_masks)
    swapped = video_masks.clone()
    swapped[-1] = video_masks[0]
    assert not torch.equal(network(clip, swapped, image_masks).video_scores, out.video_scores)


def test_forward_updates_nothing_and_the_optimiser_leaves_teachers_alone(network, clip):
    before = {k: v.clone() for k, v in network.state_dict().items()}
    optimizer = torch.optim.AdamW(network.parameters(), lr=0.1)
    losses = tiny_objective()(network(clip, *masks_for(network)))
    losses["loss"].backward()
    assert all(torch.equal(v, before[k]) for k, v in network.state_dict().items())
    optimizer.step()
    for name, value in network.state_dict().items():
        if "teacher" in name or "centre" in name:
            assert torch.equal(value, before[name]), name
    assert not torch.equal(network.video.student.cls_token, before["video_student.cls_token"])


def test_ema_and_centre_formulas(network, clip):
    out = network(clip, *masks_for(network))
    teacher = network.video.teacher.blocks[0].mlp.fc1.weight.clone()
    student = network.video.student.blocks[0].mlp.fc1.weight
    with torch.no_grad():
        student += 1
    network.video.centre.mean.fill_(2.0)
    network.update_teachers(0.75, out.video_teacher_logits, out.image_teacher_logits)
    expected = 0.75 * teacher + 0.25 * student.detach()
    torch.testing.assert_close(network.video.teacher.blocks[0].mlp.fc1.weight, expected)
    centre = 0.9 * 2.0 + 0.1 * out.video_teacher_logits.mean(0, keepdim=True)  # logits
    torch.testing.assert_close(network.video.centre.mean, centre)


def test_teachers_stay_in_evaluation_and_take_no_gradient(network):
    network.train()
    assert not network.video.teacher.training
    assert not any(p.requires_grad for p in network.video.teacher.parameters())
    assert not any(p.requires_grad for p in network.image.teacher_head.parameters())


def test_ema_of_everything_is_one_formula():
    torch.manual_seed(0)
    student = tiny_encoder()
    teacher = make_teacher(student)
    before = [p.clone() for p in teacher.parameters()]
    for parameter in student.parameters():
        torch.nn.init.normal_(parameter)
    ema_update(teacher, student, 0.9)
    for now, old, new in zip(teacher.parameters(), before, student.parameters(), strict=True):
        torch.testing.assert_close(now, 0.9 * old + 0.1 * new.detach())


@pytest.mark.parametrize(
    ("options", "wanted"),
    [
        ({"image": None, "image_head": None, "decoder": None, "num_prototypes": 0}, ["video_logits"]),
        ({"video_head": None, "decoder": None, "num_prototypes": 0}, ["image_logits"]),
        ({"video_head": None, "image_head": None}, ["video_scores", "target_scores"]),
        ({"video_head": None, "image": None, "image_head": None, "num_prototypes": 0,
          "reconstruct": True}, ["pixels", "pixel_targets"]),
        ({"video_head": None, "image": None, "image_head": None, "target": "pixels"},
         ["video_scores", "target_scores"]),
    ],
)  # fmt: skip
def test_baselines_are_configs_without_unused_parameters(clip, options, wanted):
    network = tiny_network(**options)
    out = network(clip, *masks_for(network))
    values = {f.name: getattr(out, f.name) for f in dataclasses.fields(out)}
    outputs = (
        "video_logits",
        "image_logits",
        "video_scores",
        "target_scores",
        "pixels",
        "pixel_targets",
    )
    assert [n for n in outputs if values[n] is not None] == wanted
    loss = sum(values[name].float().square().sum() for name in wanted)
    reached = set(gradients(network, loss))
    state = network.state_dict(keep_vars=True)
    assert {n for n, p in state.items() if p.requires_grad} == reached
    assert set(network.trained_fields) == {n for n in wanted if "target" not in n}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"decoder": None}, "need a decoder"),
        ({"image": None, "image_head": None}, "needs an image branch, or target: pixels"),
        ({"image": tiny_encoder(1, 1, patch_size=8)}, "token grids differ"),
        ({"target": "text"}, "target 'text' must be"),
        ({"image_frame_step": 9}, r"image_frame_step 9 must lie in \[1, 4\]"),
    ],
)
def test_parts_that_do_not_fit(options, message):
    with pytest.raises(ValueError, match=message):
        tiny_network(**options)


def test_fewer_frames_for_the_image_students(clip):
    network = tiny_network(image_frame_step=4)
    assert network.image.student_frames == [0]
    assert sorted(network.image.teacher_frames) == [0, 2]
    out = network(clip, *masks_for(network))
    assert out.image_logits.shape == (4, 3, 20)
    assert out.target_scores.shape == (3, 32, 10)


def test_a_step_of_two_branches_is_a_step_of_the_whole(network, clip):
    """The image branch's backward may come before the video branch's forward."""
    objective, masks = tiny_objective(), masks_for(network)
    expected = gradients(network, objective(network(clip, *masks))["loss"])
    network.zero_grad(set_to_none=True)
    image = network.image(clip, masks.image)
    objective(image, 0, "image")["loss"].backward()
    video = network.video(clip, masks.video, masks.teacher, image.detached().target_tokens)
    objective(image.detached().joined(video), 0, "video")["loss"].backward()
    state = network.state_dict(keep_vars=True)
    found = {n: p.grad for n, p in state.items() if p.grad is not None}
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, msg=name)


def test_the_image_branch_is_forgotten_before_the_video_branch_begins(clip):
    """Nothing of its graph is kept: only the larger branch's memory is needed at a time."""
    network, alive = tiny_network(), []
    activations = []
    network.image.student.blocks[0].register_forward_hook(
        lambda _, x, y: activations.append(weakref.ref(y))
    )
    network.video.student.blocks[0].register_forward_pre_hook(
        lambda *_: alive.append([ref() is not None for ref in activations])
    )
    engine = trainer(network=network, epochs=1)
    engine.run()
    assert alive and not any(any(now) for now in alive)


def test_files_keep_their_names_and_their_order(network):
    """Checkpoints of before the branches were modules load, and their optimiser's state fits."""
    names = list(network.state_dict())
    assert names[:3] == ["prototypes", "video_centre", "image_centre"]
    parts = list(dict.fromkeys(name.partition(".")[0] for name in names))
    assert parts == [part for part in PARTS if part in parts]
    other = tiny_network()
    other.load_state_dict(network.state_dict())
    for name, value in network.state_dict().items():
        assert torch.equal(other.state_dict()[name], value), name
    copied = copy.deepcopy(network)
    assert list(copied.state_dict()) == names
    with pytest.raises(RuntimeError, match="Missing key"):
        other.load_state_dict({n: v for n, v in network.state_dict().items() if n != "prototypes"})
