"""A network whose last blocks are fine-tuned to predict one number of a clip."""

from __future__ import annotations

import copy

from torch import Tensor, nn

from discovr_monai.evaluation.features.encoders import PLACES, FrozenEncoder, pool_tokens, pooled
from discovr_monai.evaluation.heads.fitting import last_blocks, scaled_groups


class Regressor(nn.Module):
    """An encoder whose last blocks are trained, then a layer norm and one linear output.

    Args:
        encoder: is copied, so that the evaluated one stays as it is.
        blocks: how many last blocks are trained.
        pooling: "cls", "mean", "both" or "motion"; see :class:`Section`.
        mean, spread: mean and standard deviation of the training values; untrained, the network
            predicts the mean.
        layer_decay, weight_decay: see :func:`last_blocks`.
    """

    def __init__(
        self,
        encoder: FrozenEncoder,
        blocks: int,
        pooling: str,
        mean: float,
        spread: float,
        *,
        layer_decay: float,
        weight_decay: float,
    ) -> None:
        super().__init__()
        self.encoder = copy.deepcopy(encoder)
        self.pooling, self.mean, self.spread = pooling, mean, spread
        places = min(encoder.grid[1], PLACES) * min(encoder.grid[2], PLACES)
        width = encoder.token_dim * {"both": 2, "motion": places}.get(pooling, 1)
        last = nn.Linear(width, 1)
        nn.init.zeros_(last.weight)
        nn.init.zeros_(last.bias)
        self.head = nn.Sequential(nn.LayerNorm(width), last)
        self.groups = last_blocks(
            self.encoder.encoder, blocks, layer_decay=layer_decay, weight_decay=weight_decay
        ) + scaled_groups(self.head, 1.0, weight_decay)

    def forward(self, clip: Tensor) -> Tensor:
        """(B, 3, T, H, W) -> (B,) values in the labels' unit."""
        tokens = self.encoder(clip)  # (B, g, 1 + n, d)
        x = pooled(pool_tokens(tokens, self.encoder.grid), self.pooling)
        return self.mean + self.spread * self.head(x)[:, 0]
