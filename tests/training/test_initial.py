"""Pretraining that begins with given weights."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import save_file

from discovr_monai.losses.objective import Objective
from discovr_monai.losses.reconstruction import PixelReconstruction
from discovr_monai.networks.discovr import Discovr
from discovr_monai.networks.heads import Decoder, ProjectionHead
from discovr_monai.training.checkpoint import Checkpoints
from discovr_monai.training.initial import start_from
from discovr_monai.weights.convert import convert
from discovr_monai.weights.files import CheckpointError, describe_encoders, read_checkpoint
from discovr_monai.weights.positions import Wanted
from tests.conftest import tiny_encoder, tiny_network
from tests.evaluation.conftest import CLIP
from tests.parity import released
from tests.training.test_trainer import trainer
from tests.weights.test_weights import write_ours


def image_encoder(**options):
    return tiny_encoder(1, 1, qv_bias=False, norm_eps=1e-5, **options)


def fitting(**options):
    """A network like those that :func:`released.discovr` describes."""
    sizes = {"image_size": 32, "patch_size": 8}
    video = tiny_encoder(**sizes)
    decoder = Decoder(
        in_dim=24, out_dim=24, grid=video.grid, embed_dim=24, depth=1, num_heads=2
    )  # fmt: skip
    parts = {"video": video, "image": image_encoder(**sizes), "decoder": decoder,
             "video_head": ProjectionHead(24, 32, 16, 8),
             "image_head": ProjectionHead(24, 32, 16, 8), "num_prototypes": 16}  # fmt: skip
    return Discovr(**(parts | options))


@pytest.fixture
def whole(tmp_path):
    save_file(released.discovr(), tmp_path / "in.safetensors")
    wanted = Wanted(num_heads=3, decoder_num_heads=2)
    convert(tmp_path / "in.safetensors", tmp_path / "w.safetensors", wanted=wanted, licence="MIT")
    return tmp_path / "w.safetensors"


def test_a_whole_state_gives_everything(whole):
    network = fitting()
    about, words = start_from(network, whole)
    state = read_checkpoint(whole)["network"]
    own = network.state_dict()
    assert own.keys() == state.keys()
    assert all(torch.equal(own[name], value) for name, value in state.items())
    assert "anew" not in words
    assert "not used" not in words
    assert about["source"]["licence"] == "MIT"


def test_an_encoder_file_gives_the_encoders(tmp_path):
    state = released.prefixed("encoder.", released.encoder(
        24, 2, (2, 8, 8), "qv", released.positions_1d(32, 24)))  # fmt: skip
    save_file(state, tmp_path / "in.safetensors")
    convert(tmp_path / "in.safetensors", tmp_path / "w.safetensors",
            wanted=Wanted(num_heads=3, image_size=32))  # fmt: skip
    network = fitting()
    before = {k: v.clone() for k, v in network.state_dict().items()}
    _, words = start_from(network, tmp_path / "w.safetensors")
    assert words.startswith("Beginning from w.safetensors: video_student, video_teacher; anew: ")
    for name, value in network.state_dict().items():
        part, _, rest = name.partition(".")
        if part in ("video_student", "video_teacher") and rest != "patch_embed.weight":
            source = state["encoder." + rest.replace("patch_embed", "patch_embed.proj")]
            assert torch.equal(value, source), name
        elif rest != "patch_embed.weight":
            assert torch.equal(value, before[name]), name


def test_teachers_are_lent_by_students_and_unused_parts_are_named(tmp_path):
    """A reconstruction baseline's checkpoint, without heads, into the whole method, and back."""
    write_ours(tmp_path / "full.pt", tiny_network(image=image_encoder()))
    video = tiny_encoder()
    baseline = Discovr(video=video)
    _, words = start_from(baseline, tmp_path / "full.pt")
    assert "not used: image_student, image_teacher, video_head, " in words
    state = read_checkpoint(tmp_path / "full.pt")
    for part in ("video_teacher", "image_student", "video_teacher_head"):
        state["network"] = {
            k: v for k, v in state["network"].items() if not k.startswith(f"{part}.")
        }
    torch.save(state, tmp_path / "half.pt")
    network = tiny_network(image=image_encoder())
    _, words = start_from(network, tmp_path / "half.pt")
    assert "copied from the twin: video_teacher, video_teacher_head, image_student" in words
    own = network.state_dict()
    for missing, lender in (("video_teacher", "video_student"), ("image_student", "image_teacher"),
                            ("video_teacher_head", "video_head")):  # fmt: skip
        for name, value in own.items():
            if name.startswith(f"{missing}."):
                assert torch.equal(value, state["network"][lender + name.removeprefix(missing)])


def video(**options):
    return {"video": tiny_encoder(**{"image_size": 32, "patch_size": 8} | options)}


def head_of(outputs=32, hidden=16, bottleneck=8):
    return {"video_head": ProjectionHead(24, outputs, hidden, bottleneck)}


def decoder_of(**options):
    sizes = {"in_dim": 24, "out_dim": 24, "grid": (2, 4, 4), "embed_dim": 24, "depth": 1}
    return {"decoder": Decoder(**sizes | {"num_heads": 2} | options)}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            lambda: video(num_heads=2),
            r"video_student is built otherwise. Set num_heads 3 \(now 2\)",
        ),
        (
            lambda: video(depth=3),
            r"video_student is built otherwise: 13 missing \(video_student.blocks.2.*Set depth 2 \(now 3\)",
        ),
        (
            lambda: video(frames=8),
            r"video_student.pos_embed is \(1, 33, 24\).*Set num_frames 4 \(now 8\), or convert the "
            "file with --image-size and --num-frames",
        ),
        (lambda: video(qv_bias=False), r"Set video_def#qv_bias True \(now False\)"),
        (lambda: video(norm_eps=1e-5), r"Set video_def#norm_eps 1e-06 \(now 1e-05\)"),
        (lambda: video(cls_token=False), r"Set video_def#cls_token True \(now False\)"),
        (
            lambda: {"num_prototypes": 12},
            r"prototypes is \(16, 24\), the network has \(12, 24\)\). Set num_prototypes 16 \(now 12\)",
        ),
        (lambda: head_of(outputs=30), r"video_head.last_layer.*Set video_head_def#out_dim 32 \(now 30\)"),
        (lambda: head_of(hidden=20), r"video_head.mlp.*Set video_head_def#hidden_dim 16 \(now 20\)"),
        (lambda: head_of(bottleneck=6), r"video_head.*Set video_head_def#bottleneck_dim 8 \(now 6\)"),
        (lambda: decoder_of(depth=2), r"decoder.blocks.1.*Set decoder_def#depth 1 \(now 2\)"),
        (lambda: decoder_of(embed_dim=12), r"decoder.*Set decoder_def#embed_dim 24 \(now 12\)"),
        (lambda: decoder_of(num_heads=3), r"decoder is built otherwise. Set decoder_def#num_heads 2 \(now 3\)"),
    ],
)  # fmt: skip
def test_parts_of_another_shape_name_the_key_to_change(whole, options, message):
    network = fitting(**options())
    before = {k: v.clone() for k, v in network.state_dict().items()}
    with pytest.raises(CheckpointError, match=message) as caught:
        start_from(network, whole)
    assert str(caught.value).startswith("init w.safetensors: ")
    assert all(torch.equal(v, before[k]) for k, v in network.state_dict().items())


def test_patch_size_is_named(whole):
    network = Discovr(video=tiny_encoder(image_size=16, patch_size=4))
    with pytest.raises(
        CheckpointError, match=r"Set image_size 32 \(now 16\), patch_size 8 \(now 4\)"
    ):
        start_from(network, whole)


def test_files_that_no_training_can_begin_with(tmp_path):
    torch.save({"format": 1, "network": {}}, tmp_path / "old.pt")
    with pytest.raises(
        CheckpointError, match="init old.pt does not say how its encoders are built"
    ):
        start_from(fitting(), tmp_path / "old.pt")
    about = describe_encoders(fitting(), CLIP)
    torch.save({"format": 1, "about": about, "network": {"prototypes": torch.zeros(16, 24)}},
               tmp_path / "few.pt")  # fmt: skip
    with pytest.raises(CheckpointError, match="init few.pt has no encoder that this network has"):
        start_from(fitting(), tmp_path / "few.pt")


def own_file(tmp_path):
    write_ours(tmp_path / "w.pt", tiny_network(image=image_encoder()))
    return tmp_path / "w.pt"


def test_training_begins_with_the_weights(tmp_path, capsys):
    """Attached before the first step; one step later they have moved a little."""
    file = own_file(tmp_path)
    engine = trainer(epochs=1, network=tiny_network(image=image_encoder()))
    Checkpoints(tmp_path / "out", init=file, clip=CLIP | {"mean": [0.5] * 3}).attach(engine)
    state = read_checkpoint(file)["network"]
    assert all(torch.equal(v, state[k]) for k, v in engine.network.state_dict().items())
    out = capsys.readouterr().out
    assert "Beginning from w.pt: video_student" in out
    assert "Its clips had mean [0.485, 0.456, 0.406], these have [0.5, 0.5, 0.5]" in out
    engine.run()
    moved = engine.network.video.student.norm.weight - state["video_student.norm.weight"]
    assert 0 < float(moved.abs().max()) < 0.1


def test_what_there_is_to_resume_wins(tmp_path, capsys):
    network = tiny_network(image=image_encoder())
    engine = trainer(epochs=1, network=network)
    Checkpoints(tmp_path / "out").attach(engine)
    engine.run()
    last = read_checkpoint(tmp_path / "out" / "last.pt")["network"]
    file = own_file(tmp_path)
    again = trainer(epochs=2, network=tiny_network(image=image_encoder()))
    Checkpoints(tmp_path / "out", init=file).attach(again)
    assert all(torch.equal(v, last[k]) for k, v in again.network.state_dict().items())
    assert "Beginning from" not in capsys.readouterr().out
    anew = trainer(epochs=2, network=tiny_network(image=image_encoder()))
    Checkpoints(tmp_path / "out", init=file, resume="never").attach(anew)
    assert "Beginning from w.pt" in capsys.readouterr().out


def test_the_licence_goes_on_into_checkpoints_and_through_resuming(whole, tmp_path, capsys):
    """Weights trained from others' are not free of their terms."""
    pixels = 3 * 2 * 8 * 8
    data = [
        {"clip": torch.zeros(1, 4, 32, 32, dtype=torch.uint8) + i, "id": str(i)} for i in range(4)
    ]

    def engine(epochs):
        network = Discovr(video=tiny_encoder(image_size=32, patch_size=8), reconstruct=True,
                          decoder=Decoder(in_dim=24, out_dim=24, grid=(2, 4, 4), embed_dim=24,
                                          depth=1, num_heads=2))  # fmt: skip
        assert network.video.pixel_head.out_features == pixels
        return trainer(epochs=epochs, batch_size=2, network=network, data=data,
                       objective=Objective({"pixels": PixelReconstruction()}))  # fmt: skip

    first = engine(1)
    Checkpoints(tmp_path / "out", init=whole).attach(first)
    assert "Licence of these weights: MIT" in capsys.readouterr().out
    first.run()
    second = engine(2)
    Checkpoints(tmp_path / "out").attach(second)
    second.run()
    source = read_checkpoint(tmp_path / "out" / "last.pt")["about"]["source"]
    assert (source["licence"], source["layout"]) == ("MIT", "discovr")
