"""Step against trajectory advantages of the same rollouts: distributions, groups without signal, signs within one."""

from pathlib import Path

import numpy as np
import pandas as pd
import torch
from artefacts import Artefact, command_line, find_input, read_worlds, save_figure
from matplotlib import pyplot as plt
from torch import Tensor

from sapo.analysis.plots.credit import plot_advantage_distributions, plot_sign_disagreement, plot_zero_signal
from sapo.analysis.style import FULL_WIDTH, figure_style
from sapo.credit.advantages import step_advantages, trajectory_advantages
from sapo.errors import InputError

NAME = "fig_advantage_distributions"


def matches(rows: pd.DataFrame) -> tuple[Tensor, int]:
    """m (prompts x G, K), each prompt's rollouts together, and G, of the rollouts of one seed."""
    rows = rows.sort_values(["prompt", "rollout", "level"])
    prompts, group_size, levels = (rows[column].nunique() for column in ("prompt", "rollout", "level"))
    if len(rows) != prompts * group_size * levels or rows.duplicated(["prompt", "rollout", "level"]).any():
        raise InputError(
            f"{len(rows)} rows for {prompts} prompts x {group_size} rollouts x {levels} levels: every rollout of every "
            "prompt needs one row a level."
        )
    if not rows["match"].isin((0, 1)).all():
        raise InputError("match holds values other than 0 and 1.")
    return torch.tensor(rows["match"].to_numpy(dtype=np.float32)).view(-1, levels), group_size


def credit(rows: pd.DataFrame) -> tuple[pd.DataFrame, pd.DataFrame, pd.DataFrame]:
    """The data of the three panels, each by seed: advantages, shares of groups without signal, shares of signs."""
    advantages, zeros, signs = [], [], []
    for seed, of_seed in rows.groupby("seed"):
        match, group_size = matches(of_seed)
        by_step = step_advantages(match, group_size).numpy()
        units = {"trajectory": trajectory_advantages(match.prod(1), group_size).numpy()}
        units |= {f"step {k + 1}": by_step[:, k] for k in range(by_step.shape[1])}
        for unit, values in units.items():
            advantages.append(pd.DataFrame({"credit": unit, "advantage": values}))
            silent = (values.reshape(-1, group_size) == 0).all(1).mean()
            zeros.append({"credit": unit, "seed": seed, "value": silent})
        up, down = (by_step > 0).any(1), (by_step < 0).any(1)
        for kind, share in (("different signs", up & down), ("one sign", up ^ down), ("no signal", ~(up | down))):
            signs.append({"signs": kind, "seed": seed, "value": np.mean(share)})
    return pd.concat(advantages), pd.DataFrame(zeros), pd.DataFrame(signs)


def main(out: Path, results: Path | None = None) -> list[Artefact]:
    """One figure a data set, from rollouts.csv.gz: dataset, split, preset, seed, prompt, rollout, level, match."""
    path = find_input(out, results, "rollouts.csv.gz")
    artefacts = []
    for suffix, world, rows in read_worlds(path, (), ("seed", "prompt", "rollout", "level", "match")):
        try:
            advantages, zeros, signs = credit(rows)
        except InputError as error:
            raise InputError(f"{path}, {world}: {error}") from None
        with figure_style():
            figure, axes = plt.subplots(1, 3, figsize=(FULL_WIDTH, 2.3), width_ratios=(1.25, 1, 1))
            plot_advantage_distributions(advantages, axes[0]).set_title("(a) advantages")
            plot_zero_signal(zeros, axes[1]).set_title("(b) groups without signal")
            plot_sign_disagreement(signs, axes[2]).set_title("(c) signs in a completion")
            files = save_figure(figure, out, NAME + suffix)
        prompts, group_size, seeds = (rows[column].nunique() for column in ("prompt", "rollout", "seed"))
        caption = (
            f"{world}. {group_size} stage-2 rollouts for each of {prompts} validation prompts and {seeds} seeds. "
            "Trajectory: exact match normalised over the group (GRPO); step k: match at level k normalised over the "
            "group (SAPO). (a) non-zero advantages on one scale, the share of exact zeros at the right; (b) groups "
            "whose advantages are all zero; (c) completions by the signs of their steps' advantages. Bars: mean "
            "and 95 % t interval over seeds; dots: seeds."
        )
        artefacts.append(Artefact(NAME + suffix, "Step and trajectory advantages", caption, "measured", files, path))
    return artefacts


if __name__ == "__main__":
    command_line(main, __doc__)
