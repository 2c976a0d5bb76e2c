"""Rollouts of an update: sampled again where a group has no spread, joined, and handed to TRL as lists."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from sapo.decoding.sampling import Rollouts
from sapo.training.credit_metrics import no_spread

RESAMPLING_ROUNDS = 4  # of DAPO's dynamic sampling
Row = dict[str, Any]


class WithSpread(NamedTuple):
    """What dynamic sampling found: a row and its group of rollouts each, groups with spread first."""

    rows: list[Row]
    rollouts: list[Rollouts]
    generated: int
    """Completions in all."""
    share_with_spread: float
    rounds: int


def sample_until_spread(
    rows: Sequence[Row],
    group_size: int,
    sample: Callable[[list[Row], int], tuple[Rollouts, Float[Tensor, "M C"]]],
    more: Callable[[int], list[Row]],
) -> WithSpread:
    """DAPO's dynamic sampling (arXiv 2503.14476): prompts whose group has no spread are replaced, for at most 4 rounds.
    Groups without spread fill up what is missing then.

    Args:
        sample: rollouts of rows, `group_size` each, and their rewards, in the round of this number.
        more: so many other rows.
    """
    wanted = len(rows)
    kept: list[tuple[Row, Rollouts]] = []
    spare: list[tuple[Row, Rollouts]] = []
    asked, rounds = list(rows), 0
    while rounds < RESAMPLING_ROUNDS and len(kept) < wanted:
        if rounds:
            asked = more(wanted - len(kept))
        rollouts, rewards = sample(asked, rounds)
        flat = no_spread(rewards, group_size).prod(1).bool().tolist()
        for index, (row, is_flat) in enumerate(zip(asked, flat, strict=True)):
            group = Rollouts(*(values[index * group_size : (index + 1) * group_size] for values in rollouts))
            (spare if is_flat else kept).append((row, group))
        rounds += 1
    chosen = (kept + spare)[:wanted]
    generated = (len(kept) + len(spare)) * group_size
    share = min(1.0, len(kept) / wanted)
    return WithSpread([row for row, _ in chosen], [group for _, group in chosen], generated, share, rounds)


def join_rollouts(groups: Sequence[Rollouts], pad_id: int) -> Rollouts:
    """Groups that were sampled apart as one batch of one width."""
    width = max(group.completion_ids.shape[1] for group in groups)

    def stack(name: str, filler: float) -> Tensor:
        values = [getattr(group, name) for group in groups]
        return torch.cat([torch.nn.functional.pad(part, (0, width - part.shape[1]), value=filler) for part in values])

    return Rollouts(
        stack("completion_ids", pad_id),
        stack("completion_mask", False),
        stack("logps", 0.0),
        stack("sampled", False),
        torch.cat([group.sids for group in groups]),
    )


def as_lists(rows: Int[Tensor, "B T"], lengths: Sequence[int]) -> list[list[int]]:
    """The first tokens of each row; one conversion of the whole takes a tenth of what one a row does."""
    return [row[:length] for row, length in zip(rows.tolist(), lengths, strict=True)]


def mixed_seed(*numbers: int) -> int:
    """One 63-bit seed from several numbers."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0] >> np.uint64(1))


@contextmanager
def alone_if_broken(processes: int) -> Iterator[None]:
    """Of several processes, one whose rollouts break must end as a whole: the others are waiting for it elsewhere."""
    try:
        yield
    except FloatingPointError as error:
        if processes == 1:
            raise
        raise SystemExit(f"sapo: {error}") from error
