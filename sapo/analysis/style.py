"""How figures look: one colour, label and line style a method everywhere."""

import re
import zlib
from contextlib import AbstractContextManager
from typing import Any

import matplotlib as mpl
import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb

from sapo.credit.objectives import OBJECTIVES

COLUMN_WIDTH, FULL_WIDTH = 3.25, 6.75  # inches, of a two-column page
_HUES = sns.color_palette("colorblind").as_hex()
# Objectives have hues; what they are compared with (stages, counting, other people's numbers) is grey.
METHOD_COLORS: dict[str, str] = {
    "sapo": _HUES[0],
    "grpo": _HUES[1],
    "grpo_graded": _HUES[2],
    "grpo_step_reward": _HUES[3],
    "sapo_gated": _HUES[4],
    "rank_grpo": _HUES[5],
    "gspo": _HUES[6],
    "dapo": _HUES[8],
    "sapo_outcome_reward": _HUES[9],
    "dr_grpo": "#591e71",
    "sapo_sequence_mean": "#12239e",
    "sapo_suffix": "#7a4fd0",
    "sapo_fallback": "#b2182b",
    "sapo_no_std": "#4d9de0",
    "sapo_batch_std": "#1d4e89",
    "rlvr": "#5b3a29",
    "process_grpo": "#3f6f5f",
    "rloo": "#8c564b",
    "reinforce_plus_plus": "#d45087",
    "gdpo": "#6b8e23",
    "vppo": "#00868b",
    "sign": "#708090",
    "rank_reward": "#9c755f",
    "best_of_beam": "#c44e52",
    "stage2": "#8c8c8c",
    "stage2_no_thinking": "#5a5a5a",
    "stage2_one_block": "#a0a0a0",
    "stage2_aligned": "#767676",
    "MiniOneRec": "#8a9a5b",
    "SIDReasoner": "#c71585",
    "OneRec-Think": "#b5651d",
    "LC-Rec": "#4682b4",
    "LICD": "#6a5acd",
    "R2ec": "#2f4f4f",
    "Rec-R1": "#cd853f",
    "RecCoT": "#556b2f",
    "Fusion": "#e0115f",
    "Fusion of counting": "#9b6b7a",
    "Fusion of fitted": "#b03060",
    "ReaRec": "#008b8b",
    "LETTER-TIGER": "#8b5a2b",
    "TIGER": "#a6611a",
    "SASRec": "#1b7837",
    "HSTU": "#762a83",
    "GRU4Rec": "#b35806",
    "Caser": "#01665e",
    "item_knn": "#858585",
    "cooccurrence": "#949494",
    "popularity": "#b0b0b0",
    "published": "#3c3c3c",
    "optimum": "#000000",
}
METHOD_LABELS: dict[str, str] = {  # of what is no objective; those say theirs themselves
    "stage2": "Stage 2 (no RL)",
    "stage2_no_thinking": "Stage 2, no thinking",
    "stage2_one_block": "Stage 2, one block",
    "stage2_aligned": "Stage 2, aligned before",
    "MiniOneRec": "MiniOneRec",
    "SIDReasoner": "SIDReasoner",
    "OneRec-Think": "OneRec-Think",
    "LC-Rec": "LC-Rec",
    "LICD": "LICD",
    "R2ec": "R2ec",
    "Rec-R1": "Rec-R1",
    "RecCoT": "RecCoT",
    "Fusion": "Fusion",
    "Fusion of counting": "Fusion of counting",
    "Fusion of fitted": "Fusion of fitted",
    "ReaRec": "ReaRec",
    "LETTER-TIGER": "LETTER-TIGER",
    "TIGER": "TIGER",
    "SASRec": "SASRec",
    "HSTU": "HSTU",
    "GRU4Rec": "GRU4Rec",
    "Caser": "Caser",
    "item_knn": "Item kNN",
    "cooccurrence": "Co-occurrence",
    "popularity": "Popularity",
    "published": "published",
    "optimum": "Bayes optimum",
}


SPARE_HUES = 36  # for objectives without a colour of their own
REFERENCE_LINES = {"exact": "-.", "published": ":"}  # measured lines are solid, or dashed with one seed
_STYLE: dict[Any, Any] = {
    "figure.figsize": (COLUMN_WIDTH, 2.2),
    "figure.dpi": 150,
    "figure.constrained_layout.use": True,
    "savefig.dpi": 300,
    "pdf.fonttype": 42,  # TrueType: text stays text, as venues ask
    "ps.fonttype": 42,
    "font.family": "DejaVu Sans",
    "font.size": 8,
    "axes.titlesize": 8,
    "axes.labelsize": 8,
    "xtick.labelsize": 7,
    "ytick.labelsize": 7,
    "legend.fontsize": 7,
    "legend.frameon": False,
    "axes.linewidth": 0.6,
    "xtick.major.width": 0.6,
    "ytick.major.width": 0.6,
    "lines.linewidth": 1.2,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#e6e6e6",
    "grid.linewidth": 0.5,
}


# Colour and marker of what is timed; no method has these colours.
WORK: dict[str, tuple[str, str]] = {
    "policy update": ("#1b3a4b", "o"),
    "sampling rollouts": ("#a23e48", "s"),
    "beam search": ("#3a7d44", "^"),
    "trie build": ("#6c584c", "D"),
    "trie allowed": ("#9a7aa0", "v"),
}


def figure_style() -> AbstractContextManager[None]:
    """`with figure_style(): ...` sets fonts, sizes and spines for print; a figure takes the style it is made in."""
    return mpl.rc_context(_STYLE)


def method_color(method: str) -> str:
    """The colour of a method: a variant ("sapo no_kl") has its base's, an objective without one a hue that its name
    decides, any other method that of "published"."""
    base = method.split(" ")[0]
    if color := METHOD_COLORS.get(method) or METHOD_COLORS.get(base):
        return color
    if base in OBJECTIVES:
        return str(sns.husl_palette(SPARE_HUES, l=0.5).as_hex()[zlib.crc32(base.encode()) % SPARE_HUES])
    return METHOD_COLORS["published"]


def method_label(method: str) -> str:
    """The name a method has in figures and tables: a variant of an objective gets its base's label and its suffix;
    everything else without a label keeps its own name."""
    base, _, variant = method.partition(" ")
    if method in METHOD_LABELS or _own_label(base) == base or variant.startswith("("):
        return _own_label(method)
    return f"{_own_label(base)}, {variant}" if variant else _own_label(base)


def _own_label(method: str) -> str:
    return OBJECTIVES[method].label or method if method in OBJECTIVES else METHOD_LABELS.get(method, method)


def metric_label(metric: str) -> str:
    """The name a metric has on axes and in tables; "item/" and "sid/" say what a hit is."""
    name = metric.replace("recall@", "Recall@").replace("ndcg@", "NDCG@")
    for hit, label in (("item", "item"), ("sid", "SID")):
        name = re.sub(rf"\b{hit}/(\w+@\d+)", rf"\1 by {label}", name)
    return name


def credit_color(credit: str) -> tuple[float, float, float]:
    """GRPO's orange for trajectory credit; for "step k" a shade of SAPO's blue, darker for later steps."""
    if credit == "trajectory":
        return to_rgb(METHOD_COLORS["grpo"])
    return _step_color(int(credit.removeprefix("step ")) - 1)


def new_axes(ax: Axes | None) -> Axes:
    """The axes given, or those of a figure of their own."""
    return plt.subplots()[1] if ax is None else ax


def ordered_methods(methods: pd.Series) -> list[str]:
    """Distinct methods, in the order of METHOD_COLORS, then by name."""
    order = list(METHOD_COLORS)
    return sorted(methods.unique(), key=lambda name: (order.index(name) if name in order else len(order), name))


def _step_color(step: int) -> tuple[float, float, float]:
    """Shades of SAPO's blue for the steps 0..4, from light to dark."""
    blue, amount = np.array(to_rgb(METHOD_COLORS["sapo"])), np.linspace(0.45, -0.45, 5)[step]
    mixed = blue + (1 - blue) * amount if amount > 0 else blue * (1 + amount)
    return (float(mixed[0]), float(mixed[1]), float(mixed[2]))


def _ink(color: str | tuple[float, float, float]) -> str:
    """Black or white, whichever reads better on the colour."""
    red, green, blue = to_rgb(color)
    return "black" if 0.299 * red + 0.587 * green + 0.114 * blue > 0.55 else "white"
