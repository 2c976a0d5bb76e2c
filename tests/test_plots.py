"""Figures by the numbers of what they draw: line data, bands, bar widths, colours, and text inside the page."""

import itertools

import matplotlib as mpl
import numpy as np
import pandas as pd
import pytest
from matplotlib import pyplot as plt
from matplotlib.colors import to_rgb
from matplotlib.text import Text

from sapo.analysis.plots.credit import (
    plot_advantage_distributions,
    plot_credit_units,
    plot_sign_disagreement,
    plot_zero_signal,
)
from sapo.analysis.plots.curves import plot_curve, plot_reference_line
from sapo.analysis.plots.results import plot_gains, plot_results
from sapo.analysis.results import paired_gains
from sapo.analysis.style import (
    METHOD_COLORS,
    METHOD_LABELS,
    credit_color,
    figure_style,
    method_color,
    method_label,
    metric_label,
)
from sapo.credit.objectives import OBJECTIVES, Objective
from sapo.errors import InputError
from sapo.experiments.suite import BASELINES, FUSIONS
from sapo.experiments.systems import SYSTEMS

T_HALF = 4.302653 / np.sqrt(3)  # t(0.975, 2 degrees of freedom) / sqrt(3 seeds): half width of the interval / std


@pytest.fixture(autouse=True)
def style():
    backend = mpl.get_backend()
    mpl.use("Agg")
    with figure_style():
        yield
    plt.close("all")
    mpl.use(backend)


def assert_on_the_page(figure) -> None:
    """Everything drawn, text included, lies on the figure."""
    figure.canvas.draw()
    box, (width, height) = figure.get_tightbbox(), figure.get_size_inches()
    assert min(box.x0, box.y0) > -0.02
    assert box.x1 < width + 0.02
    assert box.y1 < height + 0.02


def log(method: str, *curves: list[float], metric: str = "reward") -> pd.DataFrame:
    rows = [
        (method, seed, step, metric, value)
        for seed, curve in enumerate(curves)
        for step, value in enumerate(curve, start=1)
    ]
    return pd.DataFrame(rows, columns=["method", "seed", "step", "metric", "value"])


def test_every_objective_has_its_own_colour_and_name():
    assert len({*map(method_color, OBJECTIVES)}) == len({*map(method_label, OBJECTIVES)}) == len(OBJECTIVES)
    assert set(METHOD_LABELS) <= set(METHOD_COLORS)
    assert {name.split()[0] for name in [*BASELINES, *FUSIONS, *SYSTEMS]} <= set(METHOD_COLORS)
    assert len(set(METHOD_COLORS.values())) == len(METHOD_COLORS)
    assert METHOD_COLORS["sapo"] == "#0173b2"
    assert METHOD_COLORS["grpo"] == "#de8f05"


def test_an_objective_is_one_entry(monkeypatch):
    """Its label stands in it, its colour follows from its name, and it is none that another method has."""
    monkeypatch.setitem(OBJECTIVES, "mine", Objective("gated", "step", label="Mine"))
    assert method_label("mine") == "Mine"
    assert method_label("mine warm") == "Mine, warm"
    assert method_color("mine") == method_color("mine warm")
    assert method_color("mine") not in METHOD_COLORS.values()
    monkeypatch.setitem(OBJECTIVES, "unnamed", Objective("gated", "step"))
    assert method_label("unnamed") == "unnamed"


def test_variants_and_unknown_methods():
    assert method_color("sapo no_kl") == METHOD_COLORS["sapo"]
    assert metric_label("full/ndcg@10") == "full/NDCG@10"
    assert metric_label("office sid/recall@5") == "office Recall@5 by SID"
    assert metric_label("item/ndcg@10") == "NDCG@10 by item"
    assert method_label("sapo no_kl") == "SAPO (step-aligned), no_kl"
    assert method_label("SASRec softmax") == "SASRec softmax"  # as commands know it
    assert method_color("SASRec softmax") == METHOD_COLORS["SASRec"]
    assert method_label("SASRec (MiniOneRec)") == "SASRec (MiniOneRec)"  # a row of somebody else's
    assert method_label("BERT4Rec tuned") == "BERT4Rec tuned"
    assert method_color("BERT4Rec tuned") == METHOD_COLORS["published"]


def test_curve_is_the_mean_with_its_t_interval():
    data = pd.concat([log("grpo", [0.0, 0.2]), log("sapo", [0.0, 1.0], [0.5, 2.0], [1.0, 6.0])])
    ax = plot_curve(pd.concat([data, log("sapo", [9.0, 9.0], metric="kl")]), "reward")
    sapo, grpo = ax.get_lines()
    assert sapo.get_ydata() == pytest.approx([0.5, 3.0])
    assert list(sapo.get_xdata()) == [1, 2]
    assert sapo.get_color() == METHOD_COLORS["sapo"]
    assert (sapo.get_linestyle(), sapo.get_label()) == ("-", "SAPO (step-aligned), 3 seeds")
    assert (grpo.get_linestyle(), grpo.get_label()) == ("--", "GRPO, 1 seed")
    (band,) = ax.collections  # one seed has no band
    corners = band.get_paths()[0].vertices
    # Sample std of (0, .5, 1) is .5 and of (1, 2, 6) is sqrt((4 + 1 + 9) / 2) = sqrt(7).
    for step, mean, std in ((1, 0.5, 0.5), (2, 3.0, np.sqrt(7))):
        heights = corners[corners[:, 0] == step, 1]
        assert heights.min() == pytest.approx(mean - T_HALF * std, abs=1e-5)
        assert heights.max() == pytest.approx(mean + T_HALF * std, abs=1e-5)
    assert to_rgb(band.get_facecolor()[0][:3]) == pytest.approx(to_rgb(METHOD_COLORS["sapo"]))


def test_curve_draws_the_steps_that_all_seeds_have_and_smooths_each_seed():
    ax = plot_curve(log("sapo", [0, 3, 6, 9], [0, 3, 6]), "reward", window=3)
    assert list(ax.get_lines()[0].get_xdata()) == [1, 2, 3]
    assert ax.get_lines()[0].get_ydata() == pytest.approx([1.5, 3, 4.5])


def test_curve_refuses_what_it_cannot_draw():
    data = log("sapo", [0.0, 1.0])
    with pytest.raises(InputError, match=r"no rows of metric 'kl'; there are reward"):
        plot_curve(data, "kl")
    with pytest.raises(InputError, match="two values for one"):
        plot_curve(pd.concat([data, data]), "reward")
    with pytest.raises(InputError, match="no step in common"):
        plot_curve(pd.concat([data, data.assign(seed=1, step=data["step"] + 5)]), "reward")


def test_sources_never_share_a_line():
    ax = plot_curve(pd.concat([log("sapo", [0.0, 1.0], [1.0, 1.0]), log("grpo", [0.0, 1.0])]), "reward")
    plot_reference_line(ax, 0.7, "optimum", "exact")
    plot_reference_line(ax, 0.6, "SASRec", "published")
    assert len({line.get_linestyle() for line in ax.get_lines()}) == 4
    assert list(ax.get_lines()[2].get_ydata()) == [0.7, 0.7]
    with pytest.raises(InputError, match="'measured'"):
        plot_reference_line(ax, 0.5, "x", "measured")


@pytest.mark.parametrize("num_steps", [1, 2, 3, 5])
def test_credit_units(num_steps):
    ax = plot_credit_units(num_steps=num_steps)
    assert_on_the_page(ax.figure)
    colors = [patch.get_facecolor()[:3] for patch in ax.patches]
    # A step's block and its SID token share a shade: twice each, and the trajectory's shade in all 2K parts.
    for step in range(1, num_steps + 1):
        assert sum(np.allclose(color, credit_color(f"step {step}")) for color in colors) == 2
    assert sum(np.allclose(color, credit_color("trajectory")) for color in colors) == 2 * num_steps
    boxes = [(text.get_text(), text.get_window_extent()) for text in ax.texts]
    for (one, box), (other, other_box) in itertools.combinations(boxes, 2):
        assert not box.overlaps(other_box), (one, other)
    assert min(text.get_fontsize() for text in ax.texts) >= 6
    with pytest.raises(InputError, match="1 to 5"):
        plot_credit_units(num_steps=6)


def test_advantage_rows_share_one_scale_and_count_zeros_apart():
    data = pd.DataFrame(
        {
            "credit": ["step 1"] * 4 + ["trajectory"] * 4,
            "advantage": [-1.0, -1.0, 1.1, 0.0, 0.0, 0.0, 0.0, 1.1],
        }
    )
    ax = plot_advantage_distributions(data, bin_width=0.5)
    assert_on_the_page(ax.figure)
    # 2 of 4 in the bin [-1, -0.5) of step 1 make the tallest bar; 1 of 4 is half as tall, in either row.
    heights = {
        (round(bar.get_x(), 6), bar.get_y(), round(bar.get_height() / 0.82, 6))
        for bar in ax.patches
        if bar.get_height()
    }
    assert heights == {(-1.0, 0, 1.0), (1.0, 0, 0.5), (1.0, 1, 0.5)}
    assert [text.get_text() for text in ax.texts] == ["25%", "75%", "zero"]
    assert [label.get_text() for label in ax.get_yticklabels()] == ["step 1", "trajectory"]


def test_zero_signal_bars():
    values = {"trajectory": [0.9, 0.8, 0.7], "step 2": [0.4, 0.4, 0.4], "step 1": [0.1, 0.2, 0.3]}
    data = pd.DataFrame(
        [(credit, seed, value) for credit, row in values.items() for seed, value in enumerate(row)],
        columns=["credit", "seed", "value"],
    )
    ax = plot_zero_signal(data)
    assert_on_the_page(ax.figure)
    assert [label.get_text() for label in ax.get_yticklabels()] == ["step 2", "step 1", "trajectory"]  # bottom to top
    assert [bar.get_width() for bar in ax.patches] == pytest.approx([0.4, 0.2, 0.8])
    interval, dots = ax.get_lines()[2:4]  # of step 1, the second row
    assert interval.get_xdata() == pytest.approx([0.2 - 0.1 * T_HALF, 0.2 + 0.1 * T_HALF], abs=1e-6)
    assert list(dots.get_xdata()) == [0.1, 0.2, 0.3]
    with pytest.raises(InputError, match="no rows"):
        plot_zero_signal(data.iloc[:0])


def test_sign_disagreement_of_one_seed():
    data = pd.DataFrame(
        {"signs": ["different signs", "one sign", "no signal"], "seed": [0, 0, 0], "value": [0.5, 0.3, 0.2]}
    )
    ax = plot_sign_disagreement(data)
    assert_on_the_page(ax.figure)
    assert [bar.get_width() for bar in ax.patches] == [0.2, 0.3, 0.5]
    assert len(ax.get_lines()) == 3  # dots only: one seed has no interval


def results(method: str, *values: float, source: str = "measured", **columns) -> pd.DataFrame:
    seeds = range(len(values)) if source == "measured" else [None]
    row = {"source": source, "dataset": "toy", "split": "leave_one_out", "method": method, "preset": "quick"}
    return pd.DataFrame(
        [row | {"seed": s, "metric": "recall@10", "value": v} for s, v in zip(seeds, values, strict=True)]
    ).assign(n=100, run="r", **columns)


def test_results():
    data = pd.concat(
        [
            results("grpo", 0.1, 0.2, 0.3),
            results("sapo", 0.4, 0.5, 0.6),
            results("optimum", 0.8, source="exact"),
            results("SASRec (paper)", 0.3, source="published"),
        ]
    )
    ax = plot_results(data, "recall@10")
    assert_on_the_page(ax.figure)
    labels = [label.get_text() for label in ax.get_yticklabels()]
    assert labels == ["GRPO, 3 seeds", "SASRec (paper)", "SAPO (step-aligned), 3 seeds"]
    optimum, grpo, grpo_interval, published, sapo, _, _ = ax.get_lines()
    assert (list(optimum.get_xdata()), optimum.get_linestyle()) == ([0.8, 0.8], "-.")
    assert grpo.get_xdata() == pytest.approx([0.2])
    assert grpo_interval.get_xdata() == pytest.approx([0.2 - 0.1 * T_HALF, 0.2 + 0.1 * T_HALF], abs=1e-6)
    assert (sapo.get_markerfacecolor(), published.get_markerfacecolor()) == (METHOD_COLORS["sapo"], "white")
    with pytest.raises(InputError, match="several datasets"):
        plot_results(pd.concat([data, results("sapo", 0.1, dataset="office")]), "recall@10")
    with pytest.raises(InputError, match="no rows of metric"):
        plot_results(data, "ndcg@10")


def test_plots_draw_into_given_axes_and_save_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    figure, ax = plt.subplots()
    assert plot_curve(log("sapo", [0.0, 1.0]), "reward", ax) is ax
    assert plt.get_fignums() == [figure.number]
    assert not list(tmp_path.iterdir())


def test_style_embeds_fonts_and_is_left_behind():
    assert mpl.rcParams["pdf.fonttype"] == 42
    figure, ax = plt.subplots()
    assert not ax.spines["top"].get_visible()
    ax.set_title("a title")
    assert all(6 <= text.get_fontsize() <= 9 for text in figure.findobj(Text) if text.get_text())
    with mpl.rc_context():
        mpl.rcdefaults()
        with figure_style():
            pass
        assert mpl.rcParams["pdf.fonttype"] == 3


def gains_table() -> pd.DataFrame:
    """SAPO gains .02 and .04 over stage 2, GRPO .01 on the one seed it has."""
    rows = [("stage2", 0, 0.3), ("stage2", 1, 0.5), ("sapo", 0, 0.32), ("sapo", 1, 0.54), ("grpo", 1, 0.51)]
    table = pd.DataFrame(rows, columns=["method", "seed", "value"])
    return table.assign(metric="ndcg@10")


def test_gains_are_paired_by_seed():
    gains = paired_gains(gains_table(), "ndcg@10", "stage2")
    assert gains["sapo"].tolist() == pytest.approx([0.02, 0.04])
    assert gains["grpo"].dropna().tolist() == pytest.approx([0.01])
    ax = plot_gains(gains_table(), "ndcg@10", "stage2")
    assert [label.get_text() for label in ax.get_yticklabels()] == ["SAPO (step-aligned)", "GRPO"]  # best first
    means = [line.get_xdata()[0] for line in ax.lines if line.get_markersize() == 4]
    assert means == pytest.approx([0.03, 0.01])
    top, bottom = ax.get_ylim()[::-1]
    assert top < bottom
    assert ax.get_xlabel() == "NDCG@10 over Stage 2 (no RL)"
    swapped = plot_gains(gains_table(), "ndcg@10", "stage2", order=["grpo", "sapo"])
    assert [label.get_text() for label in swapped.get_yticklabels()] == ["GRPO", "SAPO (step-aligned)"]
    with pytest.raises(InputError, match="no rows of 'recall@1' for 'stage2'"):
        paired_gains(gains_table(), "recall@1", "stage2")
    with pytest.raises(InputError, match="no method shares a seed with 'grpo'"):
        paired_gains(gains_table().query("method == 'grpo'"), "ndcg@10", "grpo")
