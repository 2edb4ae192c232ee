"""Names in other people's files, and the fate of each tensor."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from discovr_monai.weights.files import PARTS, SINGLES, strip_prefixes

# our networks have no place for these
_REFUSED = {
    r"(^|\.)(reg_token|register_tokens?|storage_tokens)$": "register tokens",
    r"(^|\.)dist_token$": "a distillation token",
    r"\.attn\.(q_norm|k_norm|norm|inner_attn_ln)\.": "norms inside attention",
    r"\.mlp\.(w\d+|fc1_[gx]|gate_proj|up_proj|down_proj|norm)\.": "a gated MLP (SwiGLU)",
    r"rope|rel_pos|relative_position": "rotary or relative positions",
    r"^(norm_pre|pre_norm|ln_pre)\.": "a norm before the blocks",
}
_LEFT = {
    "discovr": {
        r"(^|\.)local_pos_embed(_video)?$": "positions of cropped views, which are not used here",
        r"^memory": "memory of the clustering, switched off in the paper",
    },
    "videomae": {
        r"^(decoder\.|encoder_to_decoder\.|mask_token$)": "the pretraining's decoder",
        r"^(prototypes$|memory|head\.\d|head2\.|mha\.|(key|query|value)\.)": "SIGMA's targets",
        r"^(head|classifier)\.(weight|bias)$": "a classifier",
    },
    "vit": {
        r"^(decoder_|mask_token$)": "the pretraining's decoder",
        r"^(head|head_dist|classifier|fc)\.": "a classifier or projection head",
    },
}
LAYOUTS = tuple(_LEFT)


class Ledger:
    """The fate of every tensor of a file: nothing is dropped without a reason.

    Args:
        origins: canonical name -> the file's own names (several, where they are merged).
    """

    def __init__(self, origins: Mapping[str, list[str]]) -> None:
        self.origins = dict(origins)
        self.used: dict[str, list[str]] = {}
        self.left: dict[str, str] = {}
        self.notes: list[str] = []

    def use(self, name: str, target: str) -> None:
        """``name`` is part of our ``target``."""
        self.used.setdefault(name, []).append(target)

    def leave(self, name: str, reason: str) -> None:
        """``name``, or what is said in brackets behind it, is not taken over."""
        self.left[name] = reason

    def note(self, text: str) -> None:
        """Something assumed or changed; said once."""
        if text not in self.notes:
            self.notes.append(text)

    def rename(self, old: str, new: str) -> None:
        """Another canonical name."""
        self.origins[new] = self.origins.pop(old)

    def check(self) -> None:
        """Raises ValueError naming tensors without a fate."""
        placed = {*self.used, *self.left}
        lost = [o for name in self.origins if name not in placed for o in self.origins[name]]
        if lost:
            raise ValueError(
                f"{len(lost)} tensors have no known place: {lost[:8]}. None is dropped "
                "silently: take them out of the file, or choose another --layout"
            )

    def left_out(self) -> list[str]:
        """Counts, patterns and reasons of what was left out."""
        return _counted(
            f"{_pattern(origin)}: {reason}"
            for name, reason in self.left.items()
            for origin in self.origins.get(name, [name])
        )

    def lines(self) -> list[str]:
        """All fates grouped by pattern, with counts."""
        used = _counted(
            _renaming(origin, targets)
            for name, targets in self.used.items()
            for origin in self.origins[name]
        )
        return ["used", *used, "left out", *(self.left_out() or ["   0"])]


def _counted(lines: Iterable[str]) -> list[str]:
    counts: dict[str, int] = {}
    for line in lines:
        counts[line] = counts.get(line, 0) + 1
    return [f"{count:4}  {line}" for line, count in counts.items()]


def _renaming(origin: str, targets: list[str]) -> str:
    """Pattern to patterns; what keeps its name behind the part's is one line a component."""
    parts = list(dict.fromkeys(target.partition(".")[0] for target in targets))
    rests = {target.partition(".")[2] for target in targets}
    rest = rests.pop()
    if not rest or rests or not origin.endswith(rest):
        return f"{_pattern(origin)} -> {', '.join(dict.fromkeys(map(_pattern, targets)))}"
    kept, dot, _ = rest.partition(".")
    kept += ".*" if dot else ""
    return f"{origin.removesuffix(rest)}{kept} -> {', '.join(f'{p}.{kept}' for p in parts)}"


def _pattern(name: str) -> str:
    return re.sub(r"(?<=\.)\d+(?=\.)", "*", name)


def canonical(state: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, list[str]]]:
    """Names without prefixes, Hugging Face's VideoMAE ones as VideoMAE's own.

    Returns:
        The tensors, and from which names of the file each comes.

    Raises:
        ValueError: if two names become one, or one cannot be printed.
    """
    tensors: dict[str, Tensor] = {}
    origins: dict[str, list[str]] = {}
    for key, value in state.items():
        if not key.isprintable():
            raise ValueError(f"{key!r} is no name of a tensor: the file is damaged")
        name = _hugging_face(re.sub(r"^(model|videomae)\.", "", strip_prefixes(key)))
        if name in tensors:
            raise ValueError(f"{key} and {origins[name][0]} name the same tensor: keep one of them")
        tensors[name], origins[name] = value, [key]
    for name in [n for n in tensors if n.endswith(".attn.query.weight")]:
        three = [name.replace("query", part) for part in ("query", "key", "value")]
        if all(n in tensors for n in three):
            merged = name.replace("query", "qkv")
            tensors[merged] = torch.cat([tensors.pop(n) for n in three])
            origins[merged] = [origins.pop(n)[0] for n in three]
    return tensors, origins


def _hugging_face(name: str) -> str:
    for old, new in (
        (r"^embeddings\.patch_embeddings\.projection\.", "patch_embed.proj."),
        (r"^embeddings\.position_embeddings$", "pos_embed"),
        (r"^encoder\.layer\.", "blocks."),
        (r"^(blocks\.\d+)\.attention\.attention\.", r"\1.attn."),
        (r"^(blocks\.\d+)\.attention\.output\.dense\.", r"\1.attn.proj."),
        (r"^(blocks\.\d+)\.intermediate\.dense\.", r"\1.mlp.fc1."),
        (r"^(blocks\.\d+)\.output\.dense\.", r"\1.mlp.fc2."),
        (r"^(blocks\.\d+)\.layernorm_before\.", r"\1.norm1."),
        (r"^(blocks\.\d+)\.layernorm_after\.", r"\1.norm2."),
        (r"^layernorm\.", "norm."),
    ):
        name = re.sub(old, new, name)
    return name


def detect(state: Mapping[str, Tensor]) -> str:
    """The layout of canonical names.

    Raises:
        ValueError: if it is none of LAYOUTS.
    """
    shared = {"encoder", "decoder", "encoder_to_decoder", "mask_token", "prototypes"}
    if {name.split(".")[0] for name in state} & {*PARTS, *SINGLES} - shared:
        return "discovr"
    for prefix in ("encoder.", ""):
        kernel = state.get(f"{prefix}patch_embed.proj.weight")
        if kernel is not None and kernel.dim() == 5:
            return "discovr" if f"{prefix}cls_token" in state else "videomae"
        if kernel is not None and kernel.dim() == 4:
            return "vit"
    raise ValueError(
        "there is no patch embedding that convert knows (patch_embed.proj.weight of 4 or 5 "
        "dimensions), so this is no vision transformer of a known layout"
    )


def sift(layout: str, state: Mapping[str, Tensor], ledger: Ledger) -> dict[str, Tensor]:
    """Leaves out what has a reason, refuses what our encoders have not, widens halves.

    Raises:
        ValueError: naming what cannot be converted.
    """
    kept = {}
    for name, value in state.items():
        for pattern, what in _REFUSED.items():
            if re.search(pattern, name):
                raise ValueError(f"{ledger.origins[name][0]}: {what}, which our encoders have not")
        reason = next((r for p, r in _LEFT[layout].items() if re.search(p, name)), None)
        if reason is not None:
            ledger.leave(name, reason)
            continue
        if not bool(torch.isfinite(value).all()):
            raise ValueError(f"{ledger.origins[name][0]} holds values that are not finite")
        if value.is_floating_point() and value.dtype != torch.float32:
            ledger.note(f"{str(value.dtype).removeprefix('torch.')} tensors are stored as float32")
            value = value.float()
        kept[name] = value
    return kept
