"""A world in which thinking pays: the next item is computed from the last ones step by step, and is known exactly.

Code k of the next item is where automaton k ends that reads code k of the last n items: each item's code is a
permutation of the states. A policy that does not think has to compose n permutations at once; one that thinks writes
the states down one by one, block k the states of automaton k, and copies the last. Each level succeeds or fails by
itself, so that how rare an exact match is depends on how far a policy has come with each.

Words are the same in titles and thoughts: state s of automaton k is the word for code s of level k, so that the last
words of the blocks are the title of the item that they lead to.

    history   amber oak chair, coral ash lamp, green brass bowl      next   coral linen bowl
    thought   <think> green amber coral </think> <think> brass oak linen </think> <think> bowl lamp bowl </think>
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from functools import cached_property

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from numpy import ndarray

from sapo.data.catalog import Catalog
from sapo.data.interactions import Interactions, Rows, Split
from sapo.data.optimum import bayes_optimum
from sapo.errors import InputError

# A list a level; the first words are used.
WORDS = (
    "amber black coral green ivory lilac ochre white azure beige brown cyan gold grey mauve olive",
    "ash brass clay cork glass linen oak steel birch cedar copper felt iron jute marble wool",
    "bench bowl chair clock desk lamp shelf vase basket bottle cup frame mirror stool table tray",
    "attic bath cellar den garden hall loft study bedroom court dining kitchen lounge nursery office porch",
)
MOST_SIDS = 10_000  # codes ** levels: the optimum looks at all items of a history at once
ROWS_AT_ONCE = 256


@dataclass(frozen=True)
class ReasoningConfig:
    """Knobs of the world, each with what it teaches."""

    levels: int = 3
    """K, levels of a SID and blocks of a thought. More of them make exact matches rarer at the same skill a level."""
    codes: int = 8
    """Codes of a level, and states of its automaton. More of them make a lucky guess rarer."""
    window: int = 3
    """Items that decide the next one: how long a thought must be."""
    predictability: float = 0.85
    """Probability that a level of the next item follows its automaton; else it is any code. Bounds what can be
    reached."""
    item_share: float = 1.0
    """Share of the SIDs that are items. With fewer, the trie forces codes, and matches come for nothing."""
    coupled: bool = False
    """Whether automaton k starts where automaton k - 1 ended, so that an early error spoils the later steps."""
    teacher_error: float = 0.0
    """Share of the words of traces that are drawn at random: a teacher who errs."""
    traced_share: float = 1.0
    """Share of the training rows that have a trace: how much a teacher has explained."""
    num_users: int = 3000
    """Sequences drawn. Each is a validation and a test row."""
    lengths: tuple[int, int] = (6, 9)
    """Shortest and longest sequence. The first `window` items of one are uniform."""
    seed: int = 0
    """Of the automata, the numbers of the items and the users."""

    def __post_init__(self) -> None:
        most = len(WORDS[0].split())
        if not 2 <= self.levels <= len(WORDS):
            raise InputError(f"levels is {self.levels}; at least 2, and there are words for {len(WORDS)}.")
        if not 2 <= self.codes <= most:
            raise InputError(f"codes is {self.codes}; a level has 2 to {most} codes, as there are words for states.")
        if self.codes**self.levels > MOST_SIDS:
            raise InputError(
                f"codes {self.codes} to the power of levels {self.levels} makes {self.codes**self.levels:,} SIDs; at "
                f"most {MOST_SIDS:,} fit."
            )
        if self.window < 1:
            raise InputError(f"window is {self.window}; the next item depends on at least 1.")
        if not self.window + 3 <= self.lengths[0] <= self.lengths[1]:
            raise InputError(
                f"lengths is {self.lengths} and window {self.window}; the shortest sequence needs {self.window + 3} "
                f"items: a window, and a target each to train, validate and test on."
            )
        if not 0 < self.predictability <= 1:
            raise InputError(
                f"predictability is {self.predictability}; above 0, at most 1: at 0 there is nothing to predict."
            )
        if not 0 < self.item_share <= 1 or round(self.item_share * self.codes**self.levels) < self.codes:
            raise InputError(
                f"item_share is {self.item_share}; at most 1, and at least an item for each of {self.codes} codes of "
                f"level 1."
            )
        for name, low, high in (("teacher_error", 0, 1), ("traced_share", 0, 1)):
            if not low <= getattr(self, name) <= high:
                raise InputError(f"{name} is {getattr(self, name)}; a share from {low} to {high}.")
        if not self.traced_share:
            raise InputError("traced_share is 0; stage 2 learns to think from traces, and there would be none.")
        if self.num_users < 1:
            raise InputError(f"num_users is {self.num_users}; at least 1 fits.")

    @property
    def name(self) -> str:
        """What results are filed under: "reasoning", and the knobs that are not at their default."""
        turned = []
        for field in fields(self):
            value = getattr(self, field.name)
            if value != field.default:
                shown = "-".join(map(str, value)) if isinstance(value, tuple) else f"{value:g}"
                turned.append(field.name if value is True else f"{field.name}{shown}")
        return "-".join(["reasoning", *turned])


class ReasoningWorld:
    """The world of a config: `catalog`, `interactions`, their exact next-item distribution, and truthful traces.

    Attributes:
        automata: (K, codes, codes), state after reading an input code in a state: `automata[k, code, state]`.
        words: for each level the words of its codes and states.
    """

    def __init__(self, config: ReasoningConfig | None = None):
        self.config = config = config or ReasoningConfig()
        machines, tree, users = (np.random.default_rng((config.seed, stream)) for stream in range(3))
        size = config.codes
        self.automata = np.stack(
            [[machines.permutation(size) for _ in range(size)] for _ in range(config.levels)]
        )  # (K, b, b)
        self.codes = _items(config, tree)
        self.words = [line.split()[:size] for line in WORDS[: config.levels]]
        named = [[self.words[level][code] for level, code in enumerate(sid)] for sid in self.codes.tolist()]
        self.catalog = Catalog(
            config.name,
            torch.from_numpy(self.codes),
            [" ".join(words) for words in named],
            categories=[words[0] for words in named],
        )
        self._is_node = [np.zeros((size,) * (level + 1), bool) for level in range(config.levels)]
        for level, nodes in enumerate(self._is_node):
            nodes[tuple(self.codes[:, : level + 1].T)] = True
        sequences = self._draw(users)
        names = [f"user{number}" for number in range(len(sequences))]
        self.interactions = Interactions(names, sequences, self.catalog.num_items)

    @cached_property
    def split(self) -> Split:
        """Leave-one-out; training rows have a history that fills the window."""
        return self.interactions.leave_one_out(min_history=self.config.window)

    @property
    def traces(self) -> "StateTraces":
        """What a teacher would think, for stage 2."""
        return StateTraces(self)

    def states(self, histories: Sequence[Sequence[int]]) -> Int[ndarray, "R K n"]:
        """The states of the K automata after each of the last n items.

        Raises:
            InputError: a history of fewer than n items.
        """
        codes = self.codes[self._windows(histories)]  # (R, n, K)
        states = np.zeros((len(codes), self.config.levels, self.config.window), int)
        state = np.zeros(len(codes), int)
        for level in range(self.config.levels):
            if not self.config.coupled:
                state = np.zeros(len(codes), int)
            for place in range(self.config.window):
                state = self.automata[level][codes[:, place, level], state]
                states[:, level, place] = state
        return states

    def next_item_probabilities(
        self, histories: Sequence[Sequence[int]], reads: int | None = None
    ) -> Float[ndarray, "R N"]:
        """P(next item | history) in float64; rows sum to 1.

        Args:
            reads: what is known to who sees so many of the last items only, those before them being uniform, as they
                are in the first window of a sequence; all of the window where None.

        Raises:
            InputError: a history of fewer than n items, or `reads` outside 0..n.
        """
        window = self.config.window
        reads = window if reads is None else reads
        if not 0 <= reads <= window:
            raise InputError(f"reads is {reads}; the next item depends on the last {window} items, so 0 to {window}.")
        codes = self.codes[self._windows(histories)]
        parts = [
            self._item_probabilities(self._final_states(codes[start : start + ROWS_AT_ONCE], reads))
            for start in range(0, len(codes), ROWS_AT_ONCE)
        ]
        return np.concatenate(parts)

    def optimum(self, rows: Rows, ks: tuple[int, ...] = (1, 5, 10), reads: int | None = None) -> dict[str, float]:
        """What the Bayes-optimal recommender scores on these histories (`bayes_optimum`).

        Args:
            reads: of a recommender that sees so many of the last items only. Who scores above `reads=n-1` has composed
                the whole window: no recommender that leaves an item of it out can, thinking or not.
        """
        windows, counts = np.unique(self._windows(rows.history), axis=0, return_counts=True)
        histories = windows.tolist()
        believed = None if reads is None else self.next_item_probabilities(histories, reads)
        true = self.next_item_probabilities(histories)
        return bayes_optimum(true, self.codes, ks, counts / counts.sum(), believed)

    def _windows(self, histories: Sequence[Sequence[int]]) -> Int[ndarray, "R n"]:
        window = self.config.window
        for row, history in enumerate(histories):
            if len(history) < window:
                raise InputError(f"history {row} has {len(history)} items; the next item depends on the last {window}.")
        return np.array([history[-window:] for history in histories], int).reshape(len(histories), window)

    def _final_states(self, codes: Int[ndarray, "R n K"], reads: int) -> Float[ndarray, "R K b b"]:
        """P(final state | start state) of every automaton, from row to column."""
        size, rows = self.config.codes, len(codes)
        moves = np.eye(size)[self.automata]  # (K, input, from, to)
        blind = np.linalg.matrix_power(moves.mean(1), self.config.window - reads)  # (K, from, to)
        final = np.broadcast_to(blind, (rows, *blind.shape))
        for place in range(self.config.window - reads, self.config.window):
            step = np.stack([moves[level][codes[:, place, level]] for level in range(self.config.levels)], 1)
            final = final @ step
        return final

    def _item_probabilities(self, final: Float[ndarray, "R K b b"]) -> Float[ndarray, "R N"]:
        """Sum over the final states of all automata, level by level, of the product of the levels' probabilities."""
        size, items = self.config.codes, len(self.codes)
        known = np.zeros((len(final), items, size))
        known[:, :, 0] = 1.0  # the first automaton starts in state 0
        for level in range(self.config.levels):
            if level and not self.config.coupled:
                known = known.sum(2, keepdims=True) * (np.arange(size) == 0)
            ends = known @ final[:, level]  # (R, N, b): joint with the codes before
            known = ends * self._code_probabilities(level)[None]
        return known.sum(2)

    def _code_probabilities(self, level: int) -> Float[ndarray, "N b"]:
        """P(code of the item | its prefix, final state): the state's if it leads to an item, or any that does."""
        p, mine = self.config.predictability, self.codes[:, level]
        there = self._children(level, self.codes[:, :level])  # (N, b)
        chance = 1 / there.sum(1, keepdims=True)
        follows = np.arange(self.config.codes)[None] == mine[:, None]
        return np.where(there, p * follows + (1 - p) * chance, chance)

    def _children(self, level: int, prefixes: Int[ndarray, "M d"]) -> Bool[ndarray, "M b"]:
        """Which codes continue each prefix to an item."""
        nodes = self._is_node[level]
        return nodes[tuple(prefixes.T)] if level else np.broadcast_to(nodes, (len(prefixes), len(nodes)))

    def _draw(self, rng: np.random.Generator) -> list[list[int]]:
        config, levels, window = self.config, self.config.levels, self.config.window
        number = np.full((config.codes,) * levels, -1)
        number[tuple(self.codes.T)] = np.arange(len(self.codes))
        lengths = rng.integers(config.lengths[0], config.lengths[1] + 1, size=config.num_users)
        items = np.empty((config.num_users, lengths.max()), int)
        items[:, :window] = rng.integers(len(self.codes), size=(config.num_users, window))
        for position in range(window, items.shape[1]):
            final = self.states(items[:, :position].tolist())[:, :, -1]  # (U, K)
            drawn = np.empty((config.num_users, 0), int)
            for level in range(levels):
                there = self._children(level, drawn)
                chance = there / there.sum(1, keepdims=True)
                led = np.eye(config.codes)[final[:, level]]
                probability = np.where(
                    (led * there).any(1, keepdims=True),
                    config.predictability * led + (1 - config.predictability) * chance,
                    chance,
                )
                below = probability.cumsum(1) <= rng.random((config.num_users, 1)) * probability.sum(1, keepdims=True)
                drawn = np.column_stack([drawn, below.sum(1)])
            items[:, position] = number[tuple(drawn.T)]
        return [row[:length].tolist() for row, length in zip(items, lengths, strict=True)]


class StateTraces:
    """The words of the states after each item of the window, a block for each automaton: functions of the history."""

    def __init__(self, world: ReasoningWorld):
        self.world = world

    def rows(self, train: Rows) -> Rows:
        """The share of the rows that the world's teacher has explained."""
        config = self.world.config
        if config.traced_share == 1:
            return train
        count = max(1, round(config.traced_share * len(train)))
        chosen = np.random.default_rng((config.seed, 3)).choice(len(train), count, replace=False)
        return train.take(sorted(chosen.tolist()))

    def of_row(self, history: Sequence[int], target: int) -> list[str]:
        """The K blocks after a history, whatever came next. A teacher who errs makes the same error each time."""
        config = self.world.config
        states = self.world.states([history])[0]  # (K, n)
        if config.teacher_error:
            rng = np.random.default_rng((config.seed, 4, *history[-config.window :]))
            wrong = rng.random(states.shape) < config.teacher_error
            states = np.where(wrong, rng.integers(config.codes, size=states.shape), states)
        return [
            " ".join(words[state] for state in of_level)
            for words, of_level in zip(self.world.words, states.tolist(), strict=True)
        ]


def _items(config: ReasoningConfig, rng: np.random.Generator) -> Int[ndarray, "N K"]:
    """Codes of the items, at least one under every code of level 1, in random order."""
    leaves, below = config.codes**config.levels, config.codes ** (config.levels - 1)
    kept = np.arange(config.codes) * below + rng.integers(below, size=config.codes)
    rest = np.setdiff1d(np.arange(leaves), kept)
    more = rng.choice(rest, round(config.item_share * leaves) - config.codes, replace=False)
    order = rng.permutation(np.concatenate([kept, more]))
    return np.stack(np.unravel_index(order, (config.codes,) * config.levels), axis=1)
