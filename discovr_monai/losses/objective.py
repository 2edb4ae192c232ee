"""The objective: weighted terms, each from :class:`DiscovrOutput` to a scalar."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn

from discovr_monai.base.types import DiscovrOutput


class Objective(nn.Module):
    """Weighted sum of named terms.

    Args:
        terms: name -> a module with ``needs`` (fields of :class:`DiscovrOutput`) and
            ``forward(output, step)``.
        weights: name -> weight, 1 where missing; a term of weight 0 is skipped.

    Raises:
        ValueError: for a weight without a term, or when no term is left.
    """

    def __init__(
        self, terms: Mapping[str, nn.Module], weights: Mapping[str, float] | None = None
    ) -> None:
        super().__init__()
        weights = dict(weights or {})
        unknown = set(weights) - set(terms)
        if unknown:
            raise ValueError(f"weights for unknown terms {sorted(unknown)}; have {sorted(terms)}")
        self.weights = {name: float(weights.get(name, 1.0)) for name in terms}
        self.terms = nn.ModuleDict({n: t for n, t in terms.items() if self.weights[n]})
        if not self.terms:
            raise ValueError("the objective has no term of non-zero weight")

    terms: nn.ModuleDict

    @property
    def needs(self) -> set[str]:
        """Fields of :class:`DiscovrOutput` that the terms read."""
        return {field for term in self.terms.values() for field in term.needs}  # type: ignore[union-attr]

    @property
    def image_term(self) -> str | None:
        """The term that alone reads the image students, if it trains nothing else."""
        if type(self).forward is not Objective.forward:
            return None  # its own way with the terms
        readers = [
            (name, set(term.needs))  # type: ignore[arg-type]
            for name, term in self.terms.items()
            if {"image_logits", "image_cls"} & set(term.needs)  # type: ignore[arg-type]
        ]
        if len(readers) != 1 or any(not field.startswith("image_") for field in readers[0][1]):
            return None
        name = readers[0][0]
        return None if any(p.requires_grad for p in self.terms[name].parameters()) else name

    def forward(self, output: DiscovrOutput, step: int = 0) -> dict[str, Tensor]:
        """{"loss": weighted sum, name: unweighted scalar, ...}."""
        missing = sorted(f for f in self.needs if getattr(output, f) is None)
        if missing:
            raise ValueError(
                f"the network gives no {', '.join(missing)}, which the objective's terms "
                f"{sorted(self.terms)} need: configure the branch, or set the term's weight to 0"
            )
        known = {}
        if output.image_loss is not None:
            assert self.image_term is not None, "no term alone trains the image students"
            known = {self.image_term: output.image_loss}
        losses = {n: known[n] if n in known else t(output, step) for n, t in self.terms.items()}
        total = sum(self.weights[name] * loss for name, loss in losses.items())
        assert isinstance(total, Tensor)
        return {"loss": total, **losses}
