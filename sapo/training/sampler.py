"""Which rows an epoch of reinforcement learning reads, and in which order."""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from trl.trainer.utils import RepeatSampler


class ResumableSampler(RepeatSampler):
    """TRL's sampler, which a resumed run enters at the epoch that it was stopped in.

    TRL's own shuffles by a generator that has forgotten earlier epochs then, and reads the first one's order again.

    Args:
        epoch: says which epoch begins, from 0.
    """

    def __init__(self, *args: Any, seed: int, epoch: Callable[[], int], **settings: Any):
        super().__init__(*args, seed=seed, **settings)
        self.epoch = epoch

    def __iter__(self) -> Iterator[int]:
        if self.shuffle:
            self.generator.manual_seed(self.seed)
            for _ in range(self.epoch()):  # the orders that are behind
                torch.randperm(self.num_samples, generator=self.generator)
        return super().__iter__()
