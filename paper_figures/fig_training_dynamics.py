"""Training dynamics of SAPO and GRPO: reward, lengths, KL to the reference, gradient, validation, match rate per level.

Where DAPO was trained too, a second figure draws the three against updates and against completions generated: dynamic
sampling buys a batch full of signal with completions that are thrown away.
"""

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from artefacts import Artefact, command_line, find_input, read_worlds, save_figure
from matplotlib import pyplot as plt
from matplotlib.figure import Figure

from sapo.analysis.plots.curves import plot_curve
from sapo.analysis.style import FULL_WIDTH, figure_style, method_label
from sapo.errors import InputError

METHODS = ["sapo", "grpo"]
RESAMPLING = "dapo"
NAME = "fig_training_dynamics"
GRADIENT = "log10 grad_norm"
OPTIONAL = (GRADIENT, "frac_zero_credit", "valid/ndcg@10")  # not of every run: some look at no validation rows


def draw(rows: pd.DataFrame, window: int) -> Figure:
    """Four rows of panels: the run as a whole, how it trains, then match rate and length of every step."""
    norms = rows[(rows["metric"] == "grad_norm") & (rows["value"] > 0)]
    rows = pd.concat([rows, norms.assign(metric=GRADIENT, value=np.log10(norms["value"]))])
    levels = rows["metric"].str.extract(r"^rewards/sid_level_(\d+)/mean$")[0].dropna().astype(int).max()
    if pd.isna(levels):
        raise InputError("no rows of metric 'rewards/sid_level_1/mean'.")
    panels = [
        [
            ("rewards/exact/mean", "reward: exact match"),
            ("response_length", "tokens of a response"),
            ("kl", "KL to the reference"),
        ],
        [
            (GRADIENT, "log10 of the gradient norm"),
            ("frac_zero_credit", "groups without any credit"),
            ("valid/ndcg@10", "validation NDCG@10"),
        ],
        [(f"rewards/sid_level_{k}/mean", f"match rate, level {k}") for k in range(1, levels + 1)],
        [(f"step/{k}/length", f"tokens of step {k}") for k in range(1, levels + 1)],
    ]
    mosaic: list[Any] = [[metric for metric, _ in row for _ in range(3 * levels // len(row))] for row in panels]
    figure, axes = plt.subplot_mosaic(mosaic, figsize=(FULL_WIDTH, 6.4))
    for row in panels:
        for metric, title in row:
            if metric in OPTIONAL and not (rows["metric"] == metric).any():
                axes[metric].set_axis_off()
                continue
            share = metric.startswith(("rewards/", "frac_"))
            smooth = 1 if metric.startswith("valid/") else window  # a look is of many rows already
            low = -np.inf if metric == GRADIENT else 0
            ax = plot_curve(rows, metric, axes[metric], smooth, bounds=(low, 1 if share else np.inf))
            ax.set_title(title)
            if "length" in metric:  # from 0: a tenth of a token is no event
                ax.set_ylim(0, 1.25 * rows.loc[rows["metric"] == metric, "value"].max())
            ax.set_xlabel("update" if row is panels[-1] else "")
    handles, labels = axes[panels[0][0][0]].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=len(handles))
    return figure


def against_completions(rows: pd.DataFrame) -> pd.DataFrame:
    """The rows with `step` counting the completions generated so far, the mean over a method's seeds.

    "rollouts" is logged as the mean over the updates since the step before.
    """
    logged = rows[rows["metric"] == "rollouts"].groupby(["method", "step"], as_index=False)["value"].mean()
    updates = logged.groupby("method")["step"].diff().fillna(logged["step"])
    logged["completions"] = (logged["value"] * updates).groupby(logged["method"]).cumsum()
    counted = rows.merge(logged[["method", "step", "completions"]], on=["method", "step"], how="left")
    return counted.assign(step=counted["completions"])


def draw_cost(rows: pd.DataFrame, window: int) -> Figure:
    """Exact match against updates, and against completions generated."""
    metric = "rewards/exact/mean"
    figure, (by_update, by_completion) = plt.subplots(1, 2, figsize=(FULL_WIDTH, 2.4), sharey=True)
    plot_curve(rows, metric, by_update, window, bounds=(0, 1))
    by_update.set_ylabel("reward: exact match")
    plot_curve(against_completions(rows), metric, by_completion, window, bounds=(0, 1))
    by_completion.set_xlabel("completions generated (mean over seeds)")
    handles, labels = by_update.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=len(handles))
    return figure


def learning_rates(rows: pd.DataFrame) -> str:
    """The rates that validation chose; with different ones, KL and speed say little of the objectives."""
    rates = rows[rows["metric"] == "learning_rate"].groupby("method")["value"].max()
    chosen = ", ".join(f"{method_label(method)} {rate:g}" for method, rate in rates.items())
    return f"Learning rate, chosen on validation from one grid: {chosen}." if chosen else ""


def main(out: Path, results: Path | None = None) -> list[Artefact]:
    """One figure a data set, from dynamics.csv.gz: dataset, split, preset, method, seed, step, metric, value."""
    path = find_input(out, results, "dynamics.csv.gz")
    artefacts = []
    for suffix, world, everything in read_worlds(path, ("method", "metric"), ("seed", "step", "value")):
        rows = everything[everything["method"].isin(METHODS)]
        if rows.empty:  # another data set may have them
            continue
        window = max(1, rows["step"].nunique() // 25)
        with_dapo = everything[everything["method"].isin([*METHODS, RESAMPLING])]
        cost: tuple[Path, ...] = ()
        try:
            with figure_style():
                files = save_figure(draw(rows, window), out, NAME + suffix)
                if RESAMPLING in set(with_dapo["method"]):
                    cost = save_figure(draw_cost(with_dapo, window), out, f"{NAME}_cost{suffix}")
        except InputError as error:
            raise InputError(f"{path}, {world}: {error}") from None
        smoothed = f" Each seed is smoothed over {window} logged steps." if window > 1 else ""
        caption = (
            f"{world}. Training prompts; mean and 95 % t interval over seeds (each with its own stages 1 and 2; both "
            f"objectives of a seed start from its stage-2 checkpoint).{smoothed} A dashed line is one seed. "
            f"{learning_rates(rows)}"
        )
        artefacts.append(Artefact(NAME + suffix, "Training dynamics", caption, "measured", files, path))
        if cost:
            caption = (
                f"{world}. Exact match of training completions against updates and against the completions generated "
                f"for them: DAPO draws prompts anew, for at most 4 rounds, until their groups have spread, so its "
                f"rewards are of chosen prompts. Mean and 95 % t interval over seeds.{smoothed} "
                f"{learning_rates(with_dapo)}"
            )
            title = "Training dynamics by completions generated"
            artefacts.append(Artefact(f"{NAME}_cost{suffix}", title, caption, "measured", cost, path))
    if not artefacts:
        raise InputError(f"{path}: no rows of {' or '.join(METHODS)}.")
    return artefacts


if __name__ == "__main__":
    command_line(main, __doc__)
