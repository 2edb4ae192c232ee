"""Does the training still learn? Entropies, prototype usage, spread of the features."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from discovr_monai.base.types import DiscovrOutput
from discovr_monai.losses.clustering import ClusterDistillation
from discovr_monai.losses.distillation import SelfDistillation
from discovr_monai.losses.objective import Objective


def entropy(probabilities: Tensor) -> Tensor:
    """-sum p log p over the last dimension, in nats; zeros count as zero."""
    return torch.special.entr(probabilities).sum(-1)


def effective_rank(features: Tensor) -> Tensor:
    """exp of the entropy of the normalised singular values (Roy and Vetterli, 2007).

    Args:
        features: (M, d), centred here.

    Returns:
        Scalar in [1, min(M - 1, d)]; 1 when all features lie on one line, 0 when all are equal.
    """
    centred = features.double() - features.double().mean(0)
    values = torch.linalg.svdvals(centred)
    total = values.sum()
    if not bool(total > 1e-12):
        return torch.zeros((), dtype=torch.float64)
    return entropy(values / total).exp()


@torch.no_grad()
def diagnose(output: DiscovrOutput, objective: Objective, step: int) -> dict[str, float]:
    """Figures of one batch on this rank.

    Per branch: ``entropy`` (mean over samples of H(P_teacher) / ln K, 0..1), ``information``
    (H(mean P) - mean H(P), nats: how much the teacher's answer tells samples apart, 0 when
    collapsed), ``feature_std`` (mean over dimensions, of L2-normalised teacher CLS times
    sqrt(d): 1 when isotropic) and ``effective_rank`` (teacher CLS). For clustering:
    ``prototypes_used`` (share of prototypes that are some token's nearest, both sides).
    """
    metrics: dict[str, float] = {}
    for term in objective.terms.values():
        if isinstance(term, SelfDistillation):
            p = term.teacher_probabilities(output, step)
            mean_entropy = entropy(p).mean()
            name = term.branch
            metrics[f"{name}_entropy"] = float(mean_entropy) / math.log(p.shape[-1])
            metrics[f"{name}_information"] = float(entropy(p.mean(0)) - mean_entropy)
            cls = getattr(output, f"{name}_cls")[-1].float()  # (B, d), the teacher's
            unit = torch.nn.functional.normalize(cls, dim=-1)
            spread = unit.std(0, correction=0).square().sum().sqrt()
            metrics[f"{name}_feature_std"] = float(spread)
            metrics[f"{name}_effective_rank"] = float(effective_rank(cls[:256]))
        elif isinstance(term, ClusterDistillation):
            assert output.video_scores is not None and output.target_scores is not None
            for side, scores in (("video", output.video_scores), ("target", output.target_scores)):
                used = scores.flatten(0, 1).argmax(-1).unique().numel()
                tokens = scores.shape[0] * scores.shape[1]
                metrics[f"prototypes_used_{side}"] = used / min(scores.shape[-1], tokens)
    return metrics


def collapse_report(figures: Mapping[str, float], step: int, min_information: float) -> list[str]:
    """What looks collapsed, a sentence with remedies for each; empty when nothing does."""
    warnings = []
    for branch in ("video", "image"):
        information = figures.get(f"{branch}_information")
        if information is None or information >= min_information:
            continue
        share = figures[f"{branch}_entropy"]
        how = (
            "says the same of every sample (uniform output)"
            if share > 0.5
            else "gives every sample the same sharp answer"
        )
        warnings.append(
            f"step {step}: the {branch} teacher {how}: it tells samples apart by only "
            f"{information:.3f} nats. Try --video_head_def#norm batch, --loss#terms#video#centring "
            "sinkhorn, a lower lr or a lower teacher_temperature_schedule#end"
        )
    used = figures.get("prototypes_used_target")
    if used is not None and used < 0.02:
        warnings.append(f"step {step}: only {100 * used:.1f} % of the prototypes are used")
    return warnings
