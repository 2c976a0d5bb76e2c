"""The rows of the table: what is compared, and how one is measured."""

import statistics
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
import transformers

from benchmarks.ratios import (
    Case,
    advantages_case,
    beam_case,
    rollout_case,
    training_case,
    trie_allowed_case,
    trie_build_case,
    update_case,
)
from benchmarks.world import World, peak_bytes


@dataclass(frozen=True)
class Result:
    """A row of bench.json."""

    what: str
    against: str
    ratio: float
    ours_seconds: float
    theirs_seconds: float
    equal: bool | None


@dataclass(frozen=True)
class Measured:
    """A row, and what only the other table says: peak memory of each side, if tensors make it, and calls of each."""

    result: Result
    ours_bytes: int | None
    theirs_bytes: int | None
    rounds: int


def cases(world: World, parent: Path) -> Iterator[Callable[[], Case]]:
    """The rows, made one by one, so that one's memory is free before the next."""
    yield lambda: training_case(world, parent)
    yield lambda: update_case(world)
    yield lambda: update_case(world, sharing_alone=True)
    yield lambda: rollout_case(world)
    yield lambda: beam_case(world, 10)
    yield lambda: beam_case(world, 50)
    yield lambda: advantages_case(world)
    yield lambda: trie_build_case(world)
    yield lambda: trie_allowed_case(world)


def run(case: Case, world: World, rounds: int) -> Measured:
    """Compare, then measure memory, then time in turns."""

    def seconds(call: Callable[[], object]) -> float:
        world.synchronize()
        start = time.perf_counter()
        result = call()
        world.synchronize()
        return time.perf_counter() - start if case.seconds is None else case.seconds(result)

    equal = case.equal() if world.dtype == torch.float32 else None
    memory: list[int | None] = [None, None]
    if case.tensors:
        memory = [peak_bytes(world, call) for call in (case.ours, case.theirs)]
    else:
        case.ours()
        case.theirs()
    ours: list[float] = []
    theirs: list[float] = []
    while len(ours) < rounds or (len(ours) < 5 * rounds and max(theirs) < 0.5):
        ours.append(seconds(case.ours))
        theirs.append(seconds(case.theirs))
    mine, other = statistics.median(ours), statistics.median(theirs)
    return Measured(Result(case.what, case.against, other / mine, mine, other, equal), memory[0], memory[1], len(ours))


def run_alone(world: World, parent: Path, number: int, rounds: int) -> Measured:
    """`run` for one of `cases`, as a process of its own does it."""
    quiet()
    return run(list(cases(world, parent))[number](), world, rounds)


def quiet() -> None:
    """No warnings and no bars between the lines."""
    warnings.filterwarnings("ignore", category=FutureWarning)
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
