"""The laboratory swept: how good a noisy step of each objective is, where an exact match is rare and where it is not.

Every number is exact for its world; worlds differ by the seed of their parameters, and intervals are over worlds.
"""

from dataclasses import dataclass
from itertools import product

import pandas as pd
import torch

from sapo.common.progress import progress_bar
from sapo.lab.exact import efficiency, expected_update, improvement, second_moment, silent_share, true_gradient
from sapo.lab.world import SidWorld

RIVALS = ("grpo", "grpo_graded", "grpo_step_reward", "sapo", "sapo_gated", "sapo_suffix", "sapo_fallback")
COLUMNS = ("objective", "layout", "items", "exact_match", "coupling", "group_size", "seed")
FEW = tuple(sid for index, sid in enumerate(product(range(4), repeat=3)) if index % 5 in (1, 2))
"""26 of the 64 SIDs, a catalogue whose prefixes branch unevenly."""
TARGET = ((0, 1, 2),)


@dataclass(frozen=True)
class Sweep:
    """The grid. Three levels of four codes, two words a block, one target: 512 trajectories."""

    objectives: tuple[str, ...] = RIVALS
    exact_match: tuple[float, ...] = (0.2, 0.05, 1e-2, 1e-3, 1e-4)
    """Probability that a completion is right."""
    coupling: tuple[float, ...] = (0.0, 0.5, 1.0)
    """What block j says to token k != j, against what its own block says."""
    group_size: tuple[int, ...] = (4, 8, 16)
    layout: tuple[str, ...] = ("blocks_first",)
    items: tuple[int, ...] = (64, 26)
    """Items of the catalogue that tokens are constrained to: all 64 SIDs, or `FEW`."""
    seeds: tuple[int, ...] = tuple(range(8))


def sweep(grid: Sweep) -> pd.DataFrame:
    """One row an objective and cell: `COLUMNS`, then

    efficiency and efficiency_256 (how much a noisy step of the best length improves the expected exact match, with one
    group and with 256 groups of the prompt), cosine (of the expected update with the true gradient), silent (share of
    groups without any credit), and improvement (what one step of KL 1e-3 along the expected update gains, as a share of
    what the true gradient gains).
    """
    cells = list(product(grid.layout, grid.items, grid.exact_match, grid.coupling, grid.seeds))
    catalogues = {64: None, len(FEW): FEW}
    rows = []
    for layout, items, exact_match, coupling, seed in progress_bar("laboratory", cells):
        world = sparse_world(exact_match, coupling, layout, seed, catalogues[items])
        gradient = true_gradient(world)
        best = improvement(world, gradient)
        for objective, size in product(grid.objectives, grid.group_size):
            update, moment = expected_update(objective, world, size), second_moment(objective, world, size)
            rows.append(
                {
                    **dict(zip(COLUMNS, (objective, layout, items, exact_match, coupling, size, seed), strict=True)),
                    "efficiency": efficiency(update, moment, gradient),
                    "efficiency_256": efficiency(update, moment, gradient, groups=256),
                    "cosine": float(torch.cosine_similarity(update, gradient, dim=0)),
                    "silent": silent_share(objective, world, size),
                    "improvement": improvement(world, update) / best,
                }
            )
    return pd.DataFrame(rows)


def sparse_world(
    exact_match: float,
    coupling: float = 0.0,
    layout: str = "blocks_first",
    seed: int = 0,
    catalogue: tuple[tuple[int, ...], ...] | None = None,
    targets: tuple[tuple[int, ...], ...] = TARGET,
    target_probs: tuple[float, ...] | None = None,
) -> SidWorld:
    """The world of a cell."""
    world = SidWorld(
        (4, 4, 4), 2, targets, target_probs, catalogue=catalogue, coupling=coupling, layout=layout, seed=seed
    )
    return world.with_exact_match(exact_match)
