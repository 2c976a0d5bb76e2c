"""How cost grows: with completions a prompt, prompt length, blocks, beams, items and requests, in seconds and in
memory."""

import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks.ratios import Case, Steps, Trainers, beam_case, dict_of_sets, rollout_case, sample, update_case
from benchmarks.world import World, keep_memory, peak_bytes
from sapo.policy.ask import ask
from sapo.semantic_ids.trie import SidTrie

ROUNDS, MOST_ROUNDS, ENOUGH = 5, 15, 3.0  # calls of each side, and seconds of all after which no more are made
Row = dict[str, Any]
Calls = dict[str, Callable[[], Any]]


def measure(
    world: World, calls: dict[Any, Callable[[], Any]], tensors: bool = True, rounds: int = ROUNDS
) -> Iterator[Row]:
    """Time several calls, in turns; where tensors make their memory, after one that measures it."""
    seconds: dict[Any, list[float]] = {who: [] for who in calls}
    memory = {who: peak_bytes(world, call) if tensors else None for who, call in calls.items()}
    begin = time.perf_counter()
    for done in range(MOST_ROUNDS):
        if done >= rounds and time.perf_counter() - begin > ENOUGH:
            break
        for who, call in calls.items():
            world.synchronize()
            start = time.perf_counter()
            call()
            world.synchronize()
            seconds[who].append(time.perf_counter() - start)
    for who, values in seconds.items():
        yield row(who, values, memory[who])


def row(who: Any, values: list[float], memory: int | None) -> Row:
    """Median and range of some seconds."""
    return {
        "who": who,
        "seconds": statistics.median(values),
        "low": min(values),
        "high": max(values),
        "peak_bytes": memory,
        "rounds": len(values),
    }


def both(case: Case) -> dict[str, Callable[[], Any]]:
    return {"ours": case.ours, case.against: case.theirs}


def with_group_size(world: World, values: tuple[int, ...]) -> Iterator[Row]:
    """All sizes of one side in turns, then those of the other, whose gigabytes would stand in our way: what is asked is
    how either grows, and between two sizes the machine must not have changed."""
    setup = f"{in_prompts(world)}, {world.sizes.new_tokens} words"
    for case_of in (update_case, rollout_case):
        cases = {value: case_of(replace_sizes(world, group_size=value)) for value in values}
        for side, rounds in (("ours", 9), ("theirs", ROUNDS)):
            calls = {value: getattr(case, side) for value, case in cases.items()}
            for of in measure(world, calls, rounds=rounds):
                value, case = of["who"], cases[of["who"]]
                named = of | {"who": "ours" if side == "ours" else case.against}
                yield from labelled("completions a prompt", value, case.what, setup, [named])


def with_prompt(world: World, values: tuple[int, ...]) -> Iterator[Row]:
    for value in values:
        grown = replace_sizes(world, prompt_tokens=value)
        sizes = grown.sizes
        setup = f"{sizes.prompts} prompts, G = {sizes.group_size}, {sizes.new_tokens} words"
        for case in (update_case(grown), rollout_case(grown)):
            yield from labelled("prompt tokens", value, case.what, setup, measure(grown, both(case)))


def with_steps(world: World, values: tuple[int, ...], words: int = 4) -> Iterator[Row]:
    """K blocks of `words` words and K levels: completions grow with K too."""
    for value in values:
        grown = replace_sizes(world, steps=value, new_tokens=value * words, codes=64, levels=value)
        case, setup = update_case(grown), f"{in_prompts(grown)}, G = {grown.sizes.group_size}, {words} words a step"
        yield from labelled("steps K", value, case.what, setup, measure(grown, both(case)))
        rollouts: Calls = {"ours": partial(sample, grown, value)}
        yield from labelled("steps K", value, "sampling rollouts", setup, measure(grown, rollouts))


def with_beams(world: World, values: tuple[int, ...], longest: int = 50, batch: int = 64) -> Iterator[Row]:
    """transformers' search only up to `longest` beams: it takes its time."""
    grown = replace_sizes(world, prompts=batch, prompt_tokens=64)
    setup = f"{in_prompts(grown)}, {grown.sizes.items:,} items"
    for value in values:
        case = beam_case(grown, value, batch, grown.sizes.prompt_tokens)
        calls = both(case) if value <= longest else {"ours": case.ours}
        yield from labelled("beams", value, "beam search", setup, measure(world, calls))


def with_items(
    world: World, values: tuple[int, ...], longest: int = 1_000_000, beams: int = 10, levels: int = 4
) -> Iterator[Row]:
    """The trie of some levels, and beams over one of three; a dict of sets only up to `longest` items."""
    for value in values:
        grown = replace_sizes(world, items=value, levels=3, prompts=16, prompt_tokens=64)
        case, setup = beam_case(grown, beams, 16, 64), f"{in_prompts(grown)}, {beams} beams"
        yield from labelled("items", value, "beam search", setup, measure(grown, {"ours": case.ours}))
        sids, sizes = world.sids(value, levels), (world.sizes.codes,) * levels
        setup = f"{levels} levels of {world.sizes.codes} codes"
        calls: Calls = {"ours": partial(SidTrie, sids, sizes)}
        if value <= longest:
            calls["dict of sets"] = partial(dict_of_sets, sids)
        trie = SidTrie(sids, sizes)
        for of in labelled("items", value, "trie build", setup, measure(world, calls, tensors=False)):
            # what stays is what counts here, and Python's own objects are no tensors
            yield of | {"peak_bytes": trie.num_bytes if of["who"] == "ours" else None}
        trie = trie.to(world.device)
        asked = sids[:10_000, :-1].contiguous().to(world.device)
        allowed: Calls = {"ours": partial(trie.allowed, asked)}
        yield from labelled("items", value, "trie allowed", setup, measure(world, allowed, tensors=False))


def with_requests(world: World, values: tuple[int, ...], shown: int = 10) -> Iterator[Row]:
    """How long someone waits who asks for ten items after some titles, alone and with others."""
    policy, sizes = world.policy(shown), world.sizes
    titles = policy.catalog.titles
    histories = [[titles[(row * shown + item) % len(titles)] for item in range(shown)] for row in range(max(values))]
    setup = f"histories of {shown} titles, {sizes.levels} blocks of {policy.block_budget} words, {sizes.items:,} items"
    for value in values:
        calls: Calls = {"ours": partial(ask, policy, histories[:value])}
        yield from labelled("requests", value, "asking for ten items", setup, measure(world, calls, rounds=15))


def whole_steps(world: World, parent: Path, rounds: int = 9, steps: int = 3) -> Iterator[Row]:
    """Seconds of one update, rollouts included: SAPO against GRPO in the same set-up, shared prompts or not."""
    grown = replace_sizes(world, steps=steps)
    trainers, sizes = Trainers(grown, parent), grown.sizes
    targets = sample(grown, sizes.steps).sids[:: sizes.group_size].cpu()
    new_tokens = sizes.new_tokens + 3 * sizes.steps
    setup = f"{in_prompts(grown)}, G = {sizes.group_size}, K = {sizes.steps}"
    setup += f", completions of {new_tokens} tokens, {sizes.new_tokens} of them words"
    trained = {
        "sapo": Steps(grown, trainers.ours("sapo", targets)),
        "grpo": Steps(grown, trainers.ours("grpo", targets)),
        "sapo, prompts repeated": Steps(grown, trainers.ours("sapo", targets, share_prompts=False)),
        "grpo, stock TRL": Steps(grown, trainers.theirs(targets, new_tokens=new_tokens)),
    }
    memory = {who: peak_bytes(grown, step.run) for who, step in trained.items()}
    seconds: dict[str, list[float]] = {who: [] for who in trained}
    for _ in range(rounds):
        for who, step in trained.items():
            seconds[who].append(step.run())
    for who, values in seconds.items():
        yield from labelled("step", new_tokens, "training step", setup, [row(who, values, memory[who])])


def labelled(axis: str, value: int, what: str, setup: str, rows: Any) -> Iterator[Row]:
    for of in rows:
        yield {"axis": axis, "value": value, "what": what, "setup": setup} | of


def in_prompts(world: World) -> str:
    return f"{world.sizes.prompts} prompts of {world.sizes.prompt_tokens} tokens"


def replace_sizes(world: World, **sizes: Any) -> World:
    """The same model, asked something larger."""
    grown = World(replace(world.sizes, **sizes), world.device, world.dtype)
    grown.__dict__["model"] = world.model
    return grown


def all_growth(world: World, parent: Path, quick: bool = False) -> Iterator[Row]:
    """Everything, most of it on a fourth of the prompts; `quick` looks at two points of each."""
    keep_memory()
    few = replace_sizes(world, prompts=max(2, world.sizes.prompts // 4))
    yield from whole_steps(world, parent)
    torch.manual_seed(0)
    most = 2 if quick else None
    yield from with_group_size(world, (4, 8, 16, 32, 64)[:most])
    yield from with_prompt(few, (32, 64, 128, 256, 512)[:most])
    yield from with_steps(few, (2, 3, 4, 6, 8)[:most])
    yield from with_beams(world, (1, 5, 10, 20, 50, 100)[:most])
    yield from with_requests(replace_sizes(world), (1, 4, 16, 64)[:most])
    yield from with_items(world, (1_000, 10_000, 100_000, 1_000_000, 10_000_000)[:most])
