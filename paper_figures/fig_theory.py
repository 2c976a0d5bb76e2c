"""Theory against training: what a step from a start is predicted to be worth, against what training gained from it."""

from itertools import combinations
from pathlib import Path

import numpy as np
import pandas as pd
from artefacts import ONE_WORLD, Artefact, command_line, find_input, save_figure, save_table
from fig_components import at_chosen_rates
from matplotlib import pyplot as plt
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter
from scipy.stats import rankdata

from sapo.analysis.results import read_csv, read_results, to_numbers
from sapo.analysis.stability import METRIC
from sapo.analysis.statistics import Interval, seed_interval
from sapo.analysis.style import FULL_WIDTH, figure_style, method_color, method_label, ordered_methods
from sapo.credit.objectives import OBJECTIVES
from sapo.experiments.study import BASE
from sapo.lab.predicted import STEPS, has_closed_form, predict

NAME = "fig_theory"
PROMPTS = BASE.stage3.prompts  # of an update of the study
EARLY = 100  # updates
START = [*ONE_WORLD, "seed"]
NOTHING = Interval(np.nan, np.nan, np.nan)
VARIANT = ["steps", "parameters", "goal"]
MEASURED = {"worth": "policy", "adam_worth": "policy, Adam"}  # columns of gradients.csv, as parameters of a variant
SHOWN = ("independent", "sampled")  # steps of the figure and of the columns of its table; the goal is exact matches
RESAMPLES = 1000
FEWEST = 5  # starts
PANELS = {
    "shared": "K parameters",
    "own": "K parameters a prompt",
    "policy": "all parameters of the policy",
}


def gains(results: pd.DataFrame, looks: pd.DataFrame | None = None) -> pd.DataFrame:
    """Columns of START, method, gain (test NDCG@10 less that of the seed's stage-2 policy) and early (validation
    NDCG@10 at the last look within EARLY updates at the chosen rate, less that before them; nan without looks)."""
    rows = results[(results["source"] == "measured") & (results["metric"] == "ndcg@10")]
    known = [key for key, objective in OBJECTIVES.items() if has_closed_form(objective)]
    start = rows[rows["method"] == "stage2"].set_index(START)["value"].rename("start")
    table = rows[rows["method"].isin(known)].join(start, on=START, how="inner")
    table = table.assign(gain=table["value"] - table["start"])[[*START, "method", "gain"]]
    parts = [pd.DataFrame(columns=[*START, "method", "early"])]
    for world, of_world in looks.groupby(ONE_WORLD) if looks is not None else ():
        same = (results[ONE_WORLD] == pd.Series(world, ONE_WORLD)).all(axis=1)
        curves = at_chosen_rates(of_world[of_world["metric"] == METRIC], results[same])
        groups = curves[curves["step"] <= EARLY].sort_values("step").groupby([*START, "method"])["value"]
        parts.append((groups.last() - groups.first()).rename("early").reset_index())
    early = pd.concat(parts).astype({"early": float, "seed": int})
    return table.merge(early, on=[*START, "method"], how="left")


def predictions(rollouts: pd.DataFrame, methods: pd.DataFrame) -> pd.DataFrame:
    """The worth of a step of every method of a start, under every assumption, beside what `methods` says of it.

    Columns: those of `methods`, exact_match (share of the start's sampled completions), and VARIANT, worth.
    """
    parts = []
    for start, of_start in methods.groupby(START):
        own = rollouts[(rollouts[START] == pd.Series(start, START)).all(axis=1)]
        if own.empty:
            continue
        exact = own.groupby(["prompt", "rollout"])["match"].min().mean()
        found = predict(own, list(of_start["method"]), PROMPTS).rename(columns={"objective": "method"})
        parts.append(of_start.assign(exact_match=exact).merge(found, on="method"))
    return (
        pd.concat(parts, ignore_index=True)
        if parts
        else pd.DataFrame(columns=[*methods, "exact_match", *VARIANT, "worth"])
    )


def measured(gradients: pd.DataFrame, methods: pd.DataFrame) -> pd.DataFrame:
    """The same columns from gradients.csv: nothing is assumed of steps, which are as they were sampled."""
    table = gradients.rename(columns={"objective": "method"}).merge(methods, on=[*START, "method"])
    kept = [*methods, "goal"]
    parts = [
        table[[*kept, column]].rename(columns={column: "worth"}).assign(steps="sampled", parameters=parameters)
        for column, parameters in MEASURED.items()
    ]
    return pd.concat(parts, ignore_index=True)


def over_grpo(data: pd.DataFrame, method: str, parameters: str) -> Interval:
    """The worth of a method over GRPO's at the same start, under one assumption: geometric mean over starts."""
    rows = data[(data["parameters"] == parameters) & data["steps"].isin(SHOWN) & (data["goal"] == "exact")]
    worths = rows.pivot_table("worth", START, "method")
    ratio = (worths[method] / worths["grpo"]).dropna()
    return _geometric(ratio)


def _geometric(ratios: pd.Series) -> Interval:
    """Their geometric mean; nothing where one is no positive number, since a mean of the others would be too kind."""
    logs = np.log(ratios.where(ratios > 0))
    if not len(logs) or not np.isfinite(logs).all():
        return NOTHING
    return Interval(*np.exp(seed_interval(logs.to_numpy())))


def of_gradients(gradients: pd.DataFrame, methods: pd.DataFrame) -> pd.DataFrame:
    """A row a (start, method): what its gradients at the start say of exact matches, and its gain; means over seeds,
    with half widths of 95 % t intervals. Worths are over GRPO's of the same seed, geometric means with intervals."""
    table = gradients[gradients["goal"] == "exact"].rename(columns={"objective": "method"})
    table = table.merge(methods, on=[*START, "method"])
    rows = []
    for world, of_world in table.groupby(ONE_WORLD):
        grpo = of_world[of_world["method"] == "grpo"].set_index("seed")
        for method in ordered_methods(of_world["method"]):
            own = of_world[of_world["method"] == method].set_index("seed")
            row = dict(zip(ONE_WORLD, world, strict=True)) | {"method": method_label(method), "seeds": len(own)}
            for column in ("signal", "cosine", "gain"):
                known = own[column][np.isfinite(own[column])]
                found = seed_interval(known.to_numpy()) if len(known) else NOTHING
                row |= {column: found.value, f"{column} half": found.half}
            for column in MEASURED:
                found = _geometric(own[column] / grpo[column])
                row |= {f"{column} over GRPO": found.value, f"{column} from": found.low, f"{column} to": found.high}
            rows.append(row)
    return pd.DataFrame(rows)


def rank_correlation(data: pd.DataFrame, gain: str = "gain") -> Interval:
    """Spearman's, of worth and gain over all dots, with a 95 % bootstrap interval over whole starts.

    nan where a column does not vary; no bounds for fewer than FEWEST starts, where a bootstrap covers too little.
    """
    starts = [of_start[["worth", gain]].to_numpy() for _, of_start in data.dropna(subset=gain).groupby(START)]
    if not starts:
        return NOTHING
    value = _spearman(np.concatenate(starts))
    if len(starts) < FEWEST:
        return Interval(value, np.nan, np.nan)
    rng = np.random.default_rng(0)
    draws = rng.integers(len(starts), size=(RESAMPLES, len(starts)))
    drawn = [_spearman(np.concatenate([starts[place] for place in draw])) for draw in draws]
    low, high = np.nanquantile(drawn, [0.025, 0.975]) if np.isfinite(drawn).any() else (np.nan, np.nan)
    return Interval(value, float(low), float(high))


def _spearman(pairs: np.ndarray) -> float:
    ranks = [rankdata(column) for column in pairs.T]
    return float(np.corrcoef(ranks)[0, 1]) if min(map(np.ptp, ranks)) > 0 else np.nan


def ordered_pairs(data: pd.DataFrame, gain: str = "gain") -> tuple[int, int]:
    """Pairs of methods of one start whose worths differ by more than rounding: how many gained in the predicted order,
    and of how many."""
    right = count = 0
    for _, of_start in data.dropna(subset=gain).groupby(START):
        for (one, gained), (other, other_gained) in combinations(of_start[["worth", gain]].to_numpy(), 2):
            if not np.isclose(one, other, rtol=1e-6, atol=0):
                count += 1
                right += (one > other) == (gained > other_gained) and gained != other_gained
    return right, count


def agreement(data: pd.DataFrame) -> pd.DataFrame:
    """A row a variant and gain: rank correlation over all dots, and pairs of a start that are ordered as predicted."""
    rows = []
    for (steps, parameters, goal), of_variant in data.groupby(VARIANT):
        for gain in ("gain", "early"):
            if of_variant[gain].isna().all():
                continue
            correlation, (right, count) = rank_correlation(of_variant, gain), ordered_pairs(of_variant, gain)
            rows.append((gain, steps, parameters, goal, *correlation, right, count))
    return pd.DataFrame(rows, columns=["gain", *VARIANT, "correlation", "from", "to", "pairs right", "pairs"])


def by_start(data: pd.DataFrame) -> pd.DataFrame:
    """A row a (start, method): means over seeds of log worth and gain, their ranks within the start (1 is best), and
    by how many ranks training differs from the last prediction that all have (positive: better than predicted). Of the
    seeds that every method of a start has."""
    data = data[data["steps"].isin(SHOWN) & (data["goal"] == "exact") & (data["worth"] > 0)]
    assumed = [parameters for parameters in PANELS if parameters in set(data["parameters"])]
    rows = []
    for world, of_world in data.groupby(ONE_WORLD):
        seeds_of = of_world.groupby("method")["seed"].agg(set)
        of_world = of_world[of_world["seed"].isin(set.intersection(*seeds_of))]  # a start decides more than a method
        if of_world.empty:
            continue
        exact = of_world.groupby("seed")["exact_match"].first().mean()
        for method in ordered_methods(of_world["method"]):
            of_method = of_world[of_world["method"] == method]
            row = dict(zip(ONE_WORLD, world, strict=True)) | {"exact match": exact, "method": method_label(method)}
            for parameters in assumed:
                worths = of_method[of_method["parameters"] == parameters].set_index("seed")["worth"]
                row[f"log10 worth, {parameters}"] = float(np.log10(worths).mean())
            seeds = of_method.drop_duplicates("seed")
            gain = seed_interval(seeds["gain"].to_numpy())
            row |= {
                "seeds": len(seeds),
                "gain": gain.value,
                "gain half": gain.half,
                "early gain": seeds["early"].mean(),
            }
            rows.append(row)
    table = pd.DataFrame(rows)
    if table.empty:  # no seed has all methods
        return table
    groups = table.groupby(ONE_WORLD)
    for parameters in assumed:  # rounded, so that methods that the theory cannot tell apart share a rank
        worth = table[f"log10 worth, {parameters}"].round(6)
        table[f"rank predicted, {parameters}"] = worth.groupby([table[name] for name in ONE_WORLD]).rank(
            ascending=False
        )
    table["rank in training"] = groups["gain"].rank(ascending=False)
    complete = [name for name in assumed if table[f"log10 worth, {name}"].notna().all()]  # ranks of the same methods
    table["ranks apart"] = table[f"rank predicted, {complete[-1]}"] - table["rank in training"] if complete else np.nan
    return table.drop(columns="early gain") if table["early gain"].isna().all() else table


def draw(data: pd.DataFrame) -> Figure:
    """A panel for each kind of parameters; a dot a start and method."""
    panels = [parameters for parameters in PANELS if parameters in set(data["parameters"])]
    figure, axes = plt.subplots(1, len(panels), figsize=(FULL_WIDTH, 2.8), sharey=True)
    for ax, parameters in zip(axes, panels, strict=True):
        of_panel = data[data["parameters"] == parameters]
        for method in ordered_methods(data["method"]):
            dots = of_panel[of_panel["method"] == method]
            ax.plot(
                *(dots["worth"], dots["gain"], "o"),
                ms=3.5,
                mew=0,
                color=method_color(method),
                label=method_label(method),
            )
        ax.axhline(0, color=method_color("stage2"), linewidth=0.9, zorder=1)
        kind = "measured" if parameters in MEASURED.values() else "predicted"
        ax.set(xscale="log", xlabel=f"{kind} worth of an update", title=PANELS[parameters])
        low, high = ax.get_xlim()
        ax.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if high / low < 20 else (1,)))
        ax.xaxis.set_minor_formatter(NullFormatter())
    axes[0].set_ylabel("gain in NDCG@10, test")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside upper center", ncols=4)
    return figure


def verdict(found: pd.DataFrame) -> str:
    """How far training agrees with what is drawn, for a caption."""
    parts = []
    for gain, what in (("gain", "final gain on test"), ("early", f"validation gain of {EARLY} updates")):
        rows = found[(found["gain"] == gain) & found["steps"].isin(SHOWN) & (found["goal"] == "exact")]
        for row in rows.to_dict("records"):
            bounds = f" [{row['from']:.2f}, {row['to']:.2f}]" if np.isfinite(row["from"]) else ""
            parts.append(
                f"{what}, {row['parameters']} parameters: rank correlation {row['correlation']:.2f}{bounds}, "
                f"{row['pairs right']} of {row['pairs']} pairs of methods of one start in the predicted order"
            )
    return "; ".join(parts)


def main(out: Path, results: Path | None = None) -> list[Artefact]:
    """A figure and two tables a data set with predictions and gains, from results.csv, rollouts.csv.gz and, where there
    are any, looks.csv.gz of the same folder; a third table where gradients.csv is there."""
    path = find_input(out, results, "results.csv")
    beside = {name: path.parent / f"{name}.csv.gz" for name in ("rollouts", "looks")}
    numbers = ["seed", "prompt", "rollout", "level", "match"]
    rollouts = to_numbers(read_csv(beside["rollouts"], (*ONE_WORLD, *numbers)), numbers, str(beside["rollouts"]))
    looks = None
    if beside["looks"].is_file():
        columns = (*ONE_WORLD, "method", "metric", "seed", "learning_rate", "step", "value")
        looks = to_numbers(read_csv(beside["looks"], columns), list(columns[5:]), str(beside["looks"]))
    table = gains(read_results(path), looks)
    data, directions = predictions(rollouts.astype(dict.fromkeys(numbers, int)), table), None
    if (given := path.parent / "gradients.csv").is_file():
        values = ["seed", *MEASURED]  # signal and cosine may be no number where there is little of either
        columns = (*ONE_WORLD, "objective", "goal", "signal", "cosine", *values)
        directions = to_numbers(read_csv(given, columns), values, str(given))
        for name in ("signal", "cosine"):
            directions[name] = pd.to_numeric(directions[name], errors="coerce")
        data = pd.concat([data, measured(directions, table)], ignore_index=True)
    artefacts = []
    worlds = list(data.groupby("dataset"))
    for dataset, of_world in worlds:
        suffix = f"-{dataset}" if len(worlds) > 1 else ""
        found = agreement(of_world)
        variant = of_world[of_world["steps"].isin(SHOWN) & (of_world["goal"] == "exact")]
        variant = variant[variant["parameters"].isin(PANELS)]
        shown = variant[variant["worth"] > 0]
        if shown.empty:
            continue
        model = (
            "Worth: (E[g] . grad J)^2 / E ||g||^2, to which the expected gain of a noisy step of the best length is "
            f"proportional, J the exact match, {PROMPTS} prompts an update. In the reduced world it is exact, from the "
            "start's own sampled completions; each step of a completion is right or wrong, independently, and has one "
            "parameter, its logit. Numbers of tokens, Adam, KL and all that is not a match are left out."
        )
        if directions is not None:
            model += " The policy's own gradients are measured on batches of rollouts, over all of its parameters."
        says = verdict(found)
        with figure_style():
            files = save_figure(draw(shown), out, NAME + suffix)
        unlikely = len(variant) - len(shown)
        left_out = f" {unlikely} dots of worth 0 are left out." if unlikely else ""
        caption = (
            f"{dataset}: a dot a start (a seed's stage-2 policy) and method, at the rate that validation chose. "
            f"{model} {says[:1].upper()}{says[1:]}. Bootstrap intervals over starts, where there are {FEWEST} or more."
            f"{left_out}"
        )
        artefacts.append(Artefact(NAME + suffix, "Theory against training", caption, "exact, measured", files, path))
        starts = by_start(of_world).round(4)
        if not starts.empty:
            caption = (
                f"{dataset}. {model} Logarithms and gains are means over the seeds that all methods "
                "have, with half widths of 95 % t intervals. "
                "Ranks are of the methods of one start; methods that the theory cannot tell apart share theirs. Ranks "
                "apart: by how many training is better (or, negative, worse) than the last column that all have "
                f"says, at most {starts['ranks apart'].abs().max():g}."
            )
            name = f"table_theory{suffix}"
            files = save_table(starts, out, name, caption)
            artefacts.append(Artefact(name, "Prediction and gain", caption, "exact, measured", files, path, starts))
        caption = (
            f"{dataset}. Spearman's correlation of worth and gain over all starts and methods, bootstrap intervals "
            f"over starts where there are {FEWEST} or more, and pairs of methods of one start that gained in the "
            "predicted order. Steps: independent given the "
            f"prompt, or with the dependence found over all prompts ({' and '.join(STEPS)}); parameters: shared by all "
            f"prompts or each prompt's own; sampled: measured on the policy's own gradients, where a step of Adam has "
            "one length whatever the objective. Gain: final, on test rows, or early, of "
            f"{EARLY} updates on validation rows."
        )
        name = f"table_theory_agreement{suffix}"
        found = found.round(3)
        files = save_table(found, out, name, caption)
        artefacts.append(
            Artefact(name, "Agreement of theory and training", caption, "exact, measured", files, path, found)
        )
        own = None if directions is None else directions[directions["dataset"] == dataset]
        if own is not None and not (said := of_gradients(own, table).round(4)).empty:
            caption = (
                f"{dataset}. Gradients of the start on batches of {PROMPTS} prompts. Signal: ||E[g]||^2 / E ||g||^2, "
                "the rest is noise. Cosine: between E[g] and the gradient of exact matches. Worth over GRPO's of the "
                "same start, for plain gradient steps and for those of Adam: geometric mean over seeds with its 95 % "
                "interval. Halves are of 95 % t intervals over seeds."
            )
            name = f"table_gradients{suffix}"
            files = save_table(said, out, name, caption)
            artefacts.append(Artefact(name, "Gradients at the start", caption, "measured", files, path, said))
    return artefacts


if __name__ == "__main__":
    command_line(main, __doc__)
