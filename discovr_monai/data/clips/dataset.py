"""Clips that depend on (seed, epoch, index) only, and the order they come in."""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Mapping, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from monai.data import Dataset
from monai.transforms import Compose, Randomizable
from torch.utils.data import Sampler

from discovr_monai.base.types import Stretch


class ClipDataset(Dataset):
    """Rows through transforms whose randomness is a function of (seed, epoch, index).

    So neither the number of workers, nor their state, nor a resumed run changes a clip.

    Args:
        data: datalist rows.
        transform: from a row to a dict with the clip under "image".
        seed: any non-negative integer.
        keep: keys of the result; strings and numbers that collate.
    """

    def __init__(
        self,
        data: Sequence[Mapping[str, Any]],
        transform: Compose,
        seed: int = 0,
        keep: Sequence[str] = ("image", "id", "index"),
    ) -> None:
        super().__init__(data=list(data), transform=transform)
        self.seed, self.keep = seed, tuple(keep)

    def __getitem__(self, item: Any) -> dict[str, Any]:
        """Item ``(epoch, index)``; a plain index is of epoch 0."""
        epoch, index = item if isinstance(item, tuple) else (0, int(item))
        seeds = np.random.SeedSequence([self.seed, epoch, index]).generate_state(64)
        transforms = getattr(self.transform, "transforms", [self.transform])
        for position, transform in enumerate(transforms):
            if isinstance(transform, Randomizable):
                transform.set_random_state(seed=int(seeds[position % 64]))
        row = {"id": str(index), **self.data[index], "index": index}
        for transform in transforms:
            row = transform(row)
        return {k: row[k] for k in self.keep if k in row}


class EpochSampler(Sampler):
    """Yields (epoch, index), shuffled by (seed, epoch), from any position on.

    Batch b of all ranks together holds the same clips as batch b of one process with the
    global batch size; each rank takes its contiguous part. The last, smaller batch is dropped.
    What an epoch begun by another number of ranks has left is shared out anew.

    With ``window`` the order keeps to few files at a time: the shards are shuffled and every
    rank gets its own contiguous part of them (at most one shard is read by two ranks); each
    shuffles its rows among ``window`` shards. Batches then depend on the number of ranks.

    Args:
        length: rows.
        batch_size: per rank; the DataLoader must use the same.
        seed: of the shuffling.
        shuffle: else in order.
        rank, world_size: this process's.
        shards: each row's file, in the rows' order; needed with ``window``.
        window: shards that are mixed at a time; 0 shuffles all rows.
    """

    def __init__(
        self,
        length: int,
        batch_size: int,
        *,
        seed: int = 0,
        shuffle: bool = True,
        rank: int = 0,
        world_size: int = 1,
        shards: Sequence[Hashable] = (),
        window: int = 0,
    ) -> None:
        if batch_size < 1:
            raise ValueError(f"batch_size {batch_size} must be at least 1")
        if window < 0 or (window and len(shards) != length):
            raise ValueError(f"shard_window {window} must be 0, or above with a shard for each row")
        self.window = window
        numbers = {shard: i for i, shard in enumerate(dict.fromkeys(shards))}
        self.shards = np.array([numbers[s] for s in shards], np.int64)
        self.length, self.batch_size, self.seed, self.shuffle = length, batch_size, seed, shuffle
        self.rank, self.world_size = rank, world_size
        self.epoch = self.position = 0
        self.earlier: tuple[Stretch, ...] = ()

    @property
    def batches(self) -> int:
        """Full global batches in an epoch."""
        return self.length // (self.batch_size * self.world_size)

    def set_epoch(self, epoch: int) -> None:
        """The epoch that the next iteration is of, from 0."""
        self.epoch = epoch

    def set_position(self, batches: int, earlier: Sequence[Stretch] = ()) -> None:
        """What of the epoch is done already.

        Args:
            batches: per rank, by as many ranks as now.
            earlier: what others had done before them, in order.
        """
        self.position, self.earlier = batches, tuple(earlier)

    @property
    def left(self) -> int:
        """Full global batches that the earlier ranks have left of the epoch."""
        return len(self._rest()) // (self.batch_size * self.world_size)

    def __len__(self) -> int:
        return self.batches * self.batch_size

    def _generator(self, *more: int) -> np.random.Generator:
        return np.random.default_rng(np.random.SeedSequence([self.seed, self.epoch, *more]))

    def _whole_order(self) -> np.ndarray:
        order = torch.arange(self.length)
        if self.shuffle:
            seeds = np.random.SeedSequence([self.seed, self.epoch]).generate_state(1, np.uint64)
            generator = torch.Generator().manual_seed(int(seeds[0] >> np.uint64(1)))
            order = torch.randperm(self.length, generator=generator)
        return order.numpy()

    def _by_shard(self) -> np.ndarray:
        """All rows, those of a shard together, the shards shuffled."""
        place = self._generator(1).permutation(int(self.shards.max(initial=0)) + 1)
        return np.argsort(place[self.shards], kind="stable")

    def _mixed(self, rows: np.ndarray) -> np.ndarray:
        """A rank's rows, shuffled among ``window`` shards at a time; by rows, not by rank."""
        if not len(rows):
            return rows
        _, starts = np.unique(
            np.cumsum(np.diff(self.shards[rows], prepend=-1) != 0), return_index=True
        )
        edges = [*starts[:: self.window].tolist(), len(rows)]
        parts = [
            self._generator(2, int(rows[low])).permutation(rows[low:high])
            for low, high in pairwise(edges)
        ]
        return np.concatenate(parts)

    def parts(self, rows: np.ndarray, ranks: int, batch_size: int) -> list[np.ndarray]:
        """What each of so many ranks reads of ``rows`` (by shard), in its order."""
        count = len(rows) // (batch_size * ranks) * batch_size
        return [self._mixed(rows[r * count : (r + 1) * count]) for r in range(ranks)]

    def _rest(self) -> np.ndarray:
        """Rows that the earlier ranks have left, in the order of the epoch."""
        if not self.window:
            done = sum(s.ranks * s.batch_size * s.batches for s in self.earlier)
            return self._whole_order()[done:]
        rows = self._by_shard()
        for ranks, batch_size, batches in self.earlier:
            parts = self.parts(rows, ranks, batch_size)
            read = np.concatenate([part[: batches * batch_size] for part in parts])
            rows = rows[~np.isin(rows, read)]
        return rows

    def __iter__(self) -> Iterator[tuple[int, int]]:
        rest, total = self._rest(), self.batch_size * self.world_size
        if self.window:
            indices = self.parts(rest, self.world_size, self.batch_size)[self.rank]
        else:
            mine = rest[: len(rest) // total * total].reshape(-1, self.world_size, self.batch_size)
            indices = mine[:, self.rank].flatten()
        for index in indices[self.position * self.batch_size :].tolist():
            yield self.epoch, index


class SharedBatches(Sampler):
    """One pass in order, as batches of indices: ranks share the whole global batches.

    What is left, fewer clips than a global batch, every rank takes alike. So ranks make equally
    many batches, as collective calls want it.

    Args:
        length: rows.
        batch_size: per rank.
        rank, world_size: this process's.
    """

    def __init__(self, length: int, batch_size: int, *, rank: int = 0, world_size: int = 1) -> None:
        if batch_size < 1:
            raise ValueError(f"batch_size {batch_size} must be at least 1")
        self.length, self.batch_size, self.rank, self.world_size = (
            length,
            batch_size,
            rank,
            world_size,
        )

    @property
    def shared(self) -> int:
        """Batches that the ranks share: the first ones."""
        return self.length // (self.batch_size * self.world_size)

    def __len__(self) -> int:
        left = self.length - self.shared * self.batch_size * self.world_size
        return self.shared - (-left // self.batch_size)

    def __iter__(self) -> Iterator[list[int]]:
        size, total = self.batch_size, self.batch_size * self.world_size
        for batch in range(self.shared):
            first = batch * total + self.rank * size
            yield list(range(first, first + size))
        for first in range(self.shared * total, self.length, size):
            yield list(range(first, min(first + size, self.length)))
