"""The objective: weighted terms, each from :class:`DiscovrOutput` to a scalar."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn

from discovr_monai.base.types import OUTPUT_FIELDS, DiscovrOutput


class Objective(nn.Module):
    """Weighted sum of named terms.

    A term that reads fields of the image branch only belongs to that branch and trains it. All
    others belong to the video branch, whose forward comes second: what they read of the image
    branch gives no gradient.

    Args:
        terms: name -> a module with ``needs`` (fields of :class:`DiscovrOutput`) and
            ``forward(output, step)``.
        weights: name -> weight, 1 where missing; a term of weight 0 is skipped.

    Raises:
        ValueError: for a weight without a term, when no term is left, or for a term that would
            train both branches.
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
        self.branches = {name: _branch(name, term) for name, term in self.terms.items()}

    terms: nn.ModuleDict

    @property
    def needs(self) -> set[str]:
        """Fields of :class:`DiscovrOutput` that the terms read."""
        return {field for term in self.terms.values() for field in term.needs}  # type: ignore[union-attr]

    def forward(
        self, output: DiscovrOutput, step: int = 0, branch: str | None = None
    ) -> dict[str, Tensor]:
        """Unweighted scalars by name, and their weighted sum.

        Args:
            output: of a branch, or of both.
            step: optimiser step, for schedules.
            branch: "image" or "video" for the terms of one branch; None for all.

        Returns:
            {"loss": weighted sum, name: unweighted scalar, ...}; {} for a branch without terms.

        Raises:
            ValueError: if the output lacks a field that a term needs.
        """
        terms = {n: t for n, t in self.terms.items() if branch in (None, self.branches[n])}
        needs = {field for term in terms.values() for field in term.needs}  # type: ignore[union-attr]
        missing = sorted(field for field in needs if getattr(output, field) is None)
        if missing:
            raise ValueError(
                f"the network gives no {', '.join(missing)}, which the objective's terms "
                f"{sorted(terms)} need: configure the branch, or set the term's weight to 0"
            )
        losses: dict[str, Tensor] = {name: term(output, step) for name, term in terms.items()}
        if not losses:
            return {}
        total = sum(self.weights[name] * loss for name, loss in losses.items())
        assert isinstance(total, Tensor)
        return {"loss": total, **losses}


def _branch(name: str, term: nn.Module) -> str:
    """The branch that a term belongs to."""
    needs: tuple[str, ...] = term.needs  # type: ignore[assignment]
    if all(OUTPUT_FIELDS[field]["branch"] == "image" for field in needs):
        return "image"
    image = [field for field in needs if OUTPUT_FIELDS[field]["branch"] == "image"]
    both = [field for field in image if OUTPUT_FIELDS[field]["trains"]]
    if both:
        raise ValueError(
            f"term {name!r} reads {', '.join(both)}, which train the image branch, beside fields "
            "of the video branch, which has a backward of its own: make two terms of it"
        )
    return "video"
