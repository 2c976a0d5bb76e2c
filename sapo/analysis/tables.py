"""Tables of results: a row a method, mean ± half of the 95 % t interval over seeds, for a file, a paper, a notebook.

A table is a plain DataFrame of numbers. A column "<metric>_half" beside "<metric>" makes it a metric; marks (bold, ±,
†) are made only when it is written or shown.
"""

import hashlib
from pathlib import Path

import numpy as np
import pandas as pd
from pandas.io.formats.style import Styler

from sapo.analysis.results import WITHOUT_SEEDS, validate_results
from sapo.analysis.statistics import seed_interval
from sapo.analysis.style import METHOD_COLORS, method_label, metric_label
from sapo.common.files import write_atomically
from sapo.errors import InputError

BLOCK = ["dataset", "split", "preset"]  # rows that may be compared with each other
NOTES = (
    "Mean ± half of the 95 % t interval over seeds. Bold: best; underlined: second best, among the rows of one "
    "dataset, split, preset and source; a method with fewer seeds than others is not ranked. † published by others, "
    "‡ computed exactly."
)
_DAGGERS = {"measured": "", "published": "†", "exact": "‡"}

WRAPPED = 40  # characters of a cell from which on a column of LaTeX text is wrapped
ONE_PAGE = 50  # rows


def results_table(results: pd.DataFrame, metrics: list[str]) -> pd.DataFrame:
    """One row a (dataset, split, preset, source, method), measured before exact before published.

    Columns: dataset, split, preset, method (its label), source, seeds (of measured methods that are trained), updates
    and learning_rate (the metrics of these names: optimizer steps of the last stage, and the rate that validation
    chose), then for every metric its mean over seeds and, as "<metric>_half", half of its interval (nan with one seed).
    What a method lacks is <NA> or nan.

    Raises:
        InputError: no row has any of `metrics`.
    """
    results = validate_results(results)
    settings = {
        name: results[results["metric"] == name].groupby([*BLOCK, "method"])["value"].max()
        for name in ("updates", "learning_rate")
    }
    rows = results[results["metric"].isin(metrics)]
    if rows.empty:
        raise InputError(f"no rows of {', '.join(metrics)}; there are {', '.join(sorted(results['metric'].unique()))}.")
    lines = []
    for (*block, source, method), of_method in rows.groupby([*BLOCK, "source", "method"], sort=True):
        line = dict(zip(BLOCK, block, strict=True), method=method, source=source)
        seedless = source != "measured" or method in WITHOUT_SEEDS
        line["seeds"] = pd.NA if seedless else of_method["seed"].nunique()
        line |= {name: values.get((*block, method), np.nan) for name, values in settings.items()}
        for metric in metrics:
            values = of_method.loc[of_method["metric"] == metric, "value"].to_numpy()
            interval = seed_interval(values) if len(values) else None
            line |= {metric: np.nan, f"{metric}_half": np.nan}
            if interval is not None:
                line |= {metric: interval.value, f"{metric}_half": interval.half}
        lines.append(line)
    sources, methods = ["measured", "exact", "published"], list(METHOD_COLORS)
    lines.sort(
        key=lambda line: (
            *(line[column] for column in ("dataset", "split")),
            sources.index(line["source"]),
            line["preset"],
            methods.index(line["method"]) if line["method"] in methods else len(methods),
            line["method"],
        )
    )
    table = pd.DataFrame(lines).astype({"updates": "Int64", "seeds": "Int64"})
    table["method"] = table["method"].map(method_label)
    return table


def write_table(table: pd.DataFrame, stem: str | Path, notes: str = NOTES) -> tuple[Path, Path]:
    """Write `stem`.csv (the numbers) and `stem`.tex (booktabs, as shown); returns both paths."""
    csv, tex = Path(f"{stem}.csv"), Path(f"{stem}.tex")
    with write_atomically(csv) as temporary:
        table.to_csv(temporary, index=False, float_format="%.6f", lineterminator="\n")
    with write_atomically(tex) as temporary:
        temporary.write_text(_latex(table, notes), encoding="utf-8")
    return csv, tex


def show_table(table: pd.DataFrame) -> Styler:
    """The table as a notebook shows it. The same table gives the same HTML."""
    text = _text(table)
    ranks = _ranks(table)
    uuid = hashlib.sha256(table.to_csv().encode()).hexdigest()[:10]  # keeps the marks of two tables on a page apart
    css = {1: "font-weight: bold", 2: "text-decoration: underline"}

    def mark(shown: pd.DataFrame) -> pd.DataFrame:
        styles = pd.DataFrame("", index=shown.index, columns=shown.columns)
        for column, rank in ranks.items():
            styles[_title(column)] = rank.map(css).fillna("")
        return styles

    left = [column for column in text.columns if column not in map(_title, ranks)]
    return (
        Styler(text, uuid=uuid, cell_ids=False)
        .apply(mark, axis=None)
        .set_properties(subset=left, **{"text-align": "left"})
        .hide(axis="index")
        .format(escape="html")
        .format_index(escape="html", axis=1)
    )


def _metrics(table: pd.DataFrame) -> list[str]:
    return [column for column in table.columns if f"{column}_half" in table.columns]


def _ranks(table: pd.DataFrame) -> dict[str, pd.Series]:
    """Rank of every row within its block and source, 1 the best, from rounded values so that what looks equal is.

    A row without a rival has none, nor has one of fewer seeds than others: its mean is of other starting points.
    """
    groups = [table[column] for column in [*BLOCK, "source"] if column in table] or [pd.Series(0, index=table.index)]
    seeds = table["seeds"].astype("Float64") if "seeds" in table else pd.Series(1.0, index=table.index, dtype="Float64")
    fewer = (seeds < seeds.groupby(groups, dropna=False).transform("max")).fillna(False).astype(bool)
    ranks = {}
    for metric in _metrics(table):
        grouped = table[metric].round(4).mask(fewer).groupby(groups, dropna=False)
        ranks[metric] = grouped.rank(ascending=False, method="dense").where(grouped.transform("count") > 1)
    return ranks


def _title(column: str) -> str:
    return metric_label(column).replace("_", " ").replace("/", " ")


def _text(table: pd.DataFrame) -> pd.DataFrame:
    """Every cell as shown, without bold and underline."""
    metrics, text = _metrics(table), {}
    for column in table.columns:
        if column.removesuffix("_half") in metrics and column.endswith("_half"):
            continue
        if column in metrics:
            cells = [
                "–" if np.isnan(mean) else f"{mean:.4f}" + ("" if np.isnan(half) else f" ± {half:.4f}")
                for mean, half in zip(table[column], table[f"{column}_half"], strict=True)
            ]
        else:
            cells = ["–" if pd.isna(cell) or cell == "" else str(cell) for cell in table[column]]
        if column == "method" and "source" in table:
            cells = [cell + _DAGGERS[source] for cell, source in zip(cells, table["source"], strict=True)]
        text[_title(column)] = cells
    return pd.DataFrame(text, index=table.index)


def _latex(table: pd.DataFrame, notes: str) -> str:
    text, ranks = _text(table).map(_escape), _ranks(table)
    for metric, rank in ranks.items():
        cells = zip(text[_title(metric)], rank, strict=True)
        text[_title(metric)] = [
            f"\\textbf{{{cell}}}" if place == 1 else f"\\underline{{{cell}}}" if place == 2 else cell
            for cell, place in cells
        ]
    numbers = [*ranks, "seeds", "updates", "learning_rate"]
    widths = {column: text[_title(column)].map(len).max() for column in table if _title(column) in text and len(table)}
    wrapped = {column: min(width, 90) for column, width in widths.items() if width > WRAPPED and column not in numbers}
    share = {column: 0.72 * width / sum(wrapped.values()) for column, width in wrapped.items()}
    alignment = "".join(
        f"p{{{share[column]:.2f}\\linewidth}}" if column in share else "r" if column in numbers else "l"
        for column in table
        if _title(column) in text
    )
    several_pages = len(table) > ONE_PAGE
    environment = "longtable" if several_pages else "tabular"
    lines = [
        *(f"% {line}" for line in notes.splitlines()),
        f"% needs \\usepackage{{booktabs{',longtable' if several_pages else ''}}}",
        f"\\begin{{{environment}}}{{{alignment}}}",
        "\\toprule",
        " & ".join(map(_escape, text.columns)) + " \\\\",
    ]
    block = None
    for (_, row), of_row in zip(text.iterrows(), table.get("dataset", pd.Series("", index=table.index)), strict=True):
        if of_row != block:
            lines.append("\\midrule")
            block = of_row
        lines.append(" & ".join(row) + " \\\\")
    return "\n".join([*lines, "\\bottomrule", f"\\end{{{environment}}}"]) + "\n"


_LATEX = {
    "\\": r"\textbackslash{}",
    "±": r"$\pm$",
    "†": r"$^\dagger$",
    "‡": r"$^\ddagger$",
    "–": "--",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    **{character: f"\\{character}" for character in "&%$#_{}"},
}


def _escape(text: str) -> str:
    parts = text.split("--")  # of a command line, which LaTeX would make a dash of
    return "-{}-".join("".join(_LATEX.get(character, character) for character in part) for part in parts)
