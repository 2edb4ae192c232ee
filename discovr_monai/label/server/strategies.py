"""MONAI Label's strategies: which cine to annotate next."""

from __future__ import annotations

import threading
import time
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from monailabel.interfaces.datastore import Datastore
from monailabel.interfaces.tasks.strategy import Strategy

from discovr_monai.label.archive.saved import FINAL
from discovr_monai.label.learn.acquisition import STRATEGIES, choose, mean_entropy
from discovr_monai.label.server.analyst import CineAnalyst


class EmbeddingCache:
    """The embedding of every cine and how unsure the head is of it, computed once per version.

    Args:
        analyst: model and cines.
        seconds: that one call may spend on cines it has not seen; the next call goes on.
    """

    def __init__(self, analyst: CineAnalyst, seconds: float = 60.0) -> None:
        self.analyst, self.seconds = analyst, seconds
        self._seen: dict[str, tuple[np.ndarray, float]] = {}
        self._model = ""
        self._lock = threading.Lock()

    def __call__(self, identities: Sequence[str]) -> tuple[list[str], np.ndarray, np.ndarray]:
        """Ids of the readable cines seen so far, their embeddings (M, D), uncertainties (M,).

        Args:
            identities: of cines; those that are needed most come first.
        """
        end = time.monotonic() + self.seconds
        with self._lock:
            model = self.analyst.model.sha256
            if model != self._model:
                self._seen, self._model = {}, model
            for identity in self.missing(identities):
                self._see(identity)
                if time.monotonic() > end:
                    break
            readable = [i for i in identities if i in self._seen and self._seen[i][0].size]
        if not readable:
            return [], np.zeros((0, 1)), np.zeros(0)
        embeddings, uncertainties = zip(*(self._seen[i] for i in readable), strict=True)
        return readable, np.stack(embeddings), np.array(uncertainties)

    def missing(self, identities: Sequence[str]) -> list[str]:
        """Those that were not looked at yet."""
        return [i for i in identities if i not in self._seen]

    @torch.no_grad()
    def _see(self, identity: str) -> None:
        model = self.analyst.model
        try:
            clips = self.analyst.read(identity).clips
        except ValueError:  # an annotator could not see it either
            self._seen[identity] = (np.zeros(0), 0.0)
            return
        ready = self.analyst.ready({"image": torch.from_numpy(clips)})
        embedding = model.look(ready)["embedding"].mean(0).cpu().numpy()
        unsure = mean_entropy(model.segmenter(), ready) if "segmentation" in model.heads else 0.0
        self._seen[identity] = (embedding, unsure)


class NextCine(Strategy):
    """The unlabelled cine that a strategy of :func:`choose` names first.

    Args:
        strategy: "coverage", "uncertainty", "both" or "random".
        cache: shared by all strategies.
    """

    def __init__(self, strategy: str, cache: EmbeddingCache) -> None:
        super().__init__(f"Next cine to annotate, by {strategy}")
        self.strategy, self.cache = strategy, cache

    def __call__(self, request: Mapping[str, Any], datastore: Datastore) -> dict[str, Any] | None:
        """{"id": ..., "seen": among how many cines it was chosen, "of": how many there are}.

        Until all cines have been seen, it chooses among those that have: labelled cines are seen
        first, the others in the order of their salted ids. None if all are labelled.
        """
        labelled = set(datastore.get_labeled_images(FINAL))
        cines = sorted(datastore.list_images())
        unlabelled = [i for i in cines if i not in labelled]
        if self.strategy == "random":
            chosen = [str(np.random.default_rng().choice(unlabelled))] if unlabelled else []
            seen = cines
        else:
            order = sorted(cines, key=lambda i: (i not in labelled, i))
            seen, embeddings, uncertainties = self.cache(order)
            centres = [place for place, identity in enumerate(seen) if identity in labelled]
            places = choose(self.strategy, embeddings, centres, uncertainty=uncertainties)
            chosen = [seen[place] for place in places] or self.cache.missing(unlabelled)
        return {"id": chosen[0], "seen": len(seen), "of": len(cines)} if chosen else None


def strategies(analyst: CineAnalyst) -> dict[str, Strategy]:
    """Strategies by name."""
    cache = EmbeddingCache(analyst)
    return {name: NextCine(name, cache) for name in STRATEGIES}
