"""The networks against outputs of the released model, and strict key accounting."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from discovr_monai.weights.files import build_from_released, rename_released

ROOT = Path(__file__).parents[2]
FILE = ROOT.parent / "shared" / "parity" / "reference_tiny.npz"
present = pytest.mark.skipif(
    not FILE.exists(), reason="the parity data is not beside this clone (../shared/parity)"
)


def run(path: Path) -> subprocess.CompletedProcess[str]:
    script = [sys.executable, str(ROOT / "benchmarks" / "checks" / "parity.py"), str(path)]
    return subprocess.run(script, capture_output=True, text=True)


def released() -> dict[str, torch.Tensor]:
    with np.load(FILE, allow_pickle=False) as arrays:
        return {
            k[6:]: torch.from_numpy(np.array(arrays[k]))
            for k in arrays.files
            if k.startswith("state.")
        }


@present
def test_every_expected_output_is_reproduced():
    done = run(FILE)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count(" ok") == 9


@present
@pytest.mark.parametrize("key", ["expected.video_decoder_tokens_raster", "state.prototypes"])
def test_the_comparison_can_fail(tmp_path, key):
    with np.load(FILE, allow_pickle=False) as arrays:
        changed = {k: np.array(arrays[k]) for k in arrays.files}
    if key.startswith("state"):
        del changed[key]
    else:
        changed[key] = changed[key] + 1e-3
    np.savez(tmp_path / "changed.npz", **changed)
    assert run(tmp_path / "changed.npz").returncode == 1


@present
def test_prefixes_are_dropped_and_unknown_keys_named():
    state = released()
    wrapped = {f"module.{k}": v for k, v in state.items()}
    assert set(rename_released(wrapped)) == set(rename_released(state))
    with pytest.raises(ValueError, match=r"1 keys of the checkpoint have no place: \['surprise'\]"):
        rename_released({**state, "surprise": torch.zeros(1)})


@present
def test_no_tensor_is_dropped_or_invented():
    state = released()
    network = build_from_released(state, num_heads=4, decoder_num_heads=3)
    assert len(network.state_dict()) == len(state) == 235
    total = sum(v.double().sum() for v in network.state_dict().values())
    assert float(total) == pytest.approx(float(sum(v.double().sum() for v in state.values())))


@present
def test_a_missing_or_misshapen_tensor_is_named():
    state = released()
    del state["decoder.blocks.1.mlp.fc2.bias"]
    with pytest.raises(ValueError, match=r"1 missing \(decoder.blocks.1.mlp.fc2.bias\)"):
        build_from_released(state, num_heads=4, decoder_num_heads=3)
    state = released()
    state["video_teacher.norm.weight"] = torch.zeros(3)
    with pytest.raises(ValueError, match=r"video_teacher.norm.weight is \(3,\), the network has"):
        build_from_released(state, num_heads=4, decoder_num_heads=3)


@present
def test_other_sizes_are_read_from_the_shapes():
    """A hidden width that is no multiple, fewer prototypes, no q/v biases in the video branch."""
    state = {
        k: v
        for k, v in released().items()
        if not (k.startswith(("encoder.", "video_teacher.")) and k.endswith("_bias"))
    }
    for key, value in list(state.items()):
        if ".mlp.fc1." in key:
            state[key] = value[: len(value) - 7]
        elif key.endswith("mlp.fc2.weight"):
            state[key] = value[:, : value.shape[1] - 7]
    state["prototypes"] = state["prototypes"][:11]
    network = build_from_released(state, num_heads=4, decoder_num_heads=3)
    assert network.video.prototypes.shape == (11, 48)
    assert network.video.student.blocks[0].attn.q_bias is None
    assert network.video.student.blocks[0].mlp.fc1.out_features == 185
