"""Clips that depend on (seed, epoch, index) only, and the order they come in."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from monai.data import Dataset
from monai.transforms import Compose, Randomizable
from torch.utils.data import Sampler


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
        words = np.random.SeedSequence([self.seed, epoch, index]).generate_state(64)
        transforms = getattr(self.transform, "transforms", [self.transform])
        for position, transform in enumerate(transforms):
            if isinstance(transform, Randomizable):
                transform.set_random_state(seed=int(words[position % 64]))
        row = {"id": str(index), **self.data[index], "index": index}
        for transform in transforms:
            row = transform(row)
        return {k: row[k] for k in self.keep if k in row}


class EpochSampler(Sampler):
    """Yields (epoch, index), shuffled by (seed, epoch), from any position on.

    Batch b of all ranks together holds the same clips as batch b of one process with the
    global batch size; each rank takes its contiguous part. The last, smaller batch is dropped.

    Args:
        length: rows.
        batch_size: per rank; the DataLoader must use the same.
        seed: of the shuffling.
        shuffle: else in order.
        rank, world_size: this process's.
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
    ) -> None:
        if batch_size < 1:
            raise ValueError(f"batch_size {batch_size} must be at least 1")
        self.length, self.batch_size, self.seed, self.shuffle = length, batch_size, seed, shuffle
        self.rank, self.world_size = rank, world_size
        self.epoch = self.position = 0

    @property
    def batches(self) -> int:
        """Full global batches in an epoch."""
        return self.length // (self.batch_size * self.world_size)

    def set_epoch(self, epoch: int) -> None:
        """The epoch that the next iteration is of, from 0."""
        self.epoch = epoch

    def set_position(self, batches: int) -> None:
        """How many batches of the epoch are done already."""
        self.position = batches

    def __len__(self) -> int:
        return self.batches * self.batch_size

    def __iter__(self) -> Iterator[tuple[int, int]]:
        order = torch.arange(self.length)
        if self.shuffle:
            words = np.random.SeedSequence([self.seed, self.epoch]).generate_state(1, np.uint64)
            generator = torch.Generator().manual_seed(int(words[0] >> np.uint64(1)))
            order = torch.randperm(self.length, generator=generator)
        total = self.batch_size * self.world_size
        for batch in range(self.position, self.batches):
            first = batch * total + self.rank * self.batch_size
            for index in order[first : first + self.batch_size].tolist():
                yield self.epoch, index
