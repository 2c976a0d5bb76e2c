"""Pictures of data and of SID trees show the numbers they are given."""

import numpy as np
import pytest
import torch
from matplotlib import pyplot as plt

from sapo.analysis.plots.data import plot_days, plot_lengths, plot_popularity, plot_repeats, plot_sid_tree
from sapo.data.interactions import Interactions, PublishedPairs, Rows
from sapo.errors import InputError

DATA = Interactions(
    ["a", "b"],
    [[0, 1, 0, 2], [3, 0, 0]],
    5,
    PublishedPairs(["a", "b"], [[0, 1], [3]], Rows(["b"], [[3]], [0]), Rows(["a"], [[0, 1, 0]], [2])),
    [[10, 20, 30, 40], [15, 25, 35]],
)


@pytest.fixture(autouse=True)
def close():
    yield
    plt.close("all")


def test_lengths_and_popularity():
    line = plot_lengths(DATA).lines[0]
    assert line.get_xdata().tolist() == [3, 4]
    assert line.get_ydata().tolist() == [1, 0.5]  # all have 3 or more, half have 4
    line = plot_popularity(DATA).lines[0]
    assert line.get_ydata().tolist() == [4, 1, 1, 1]  # item 4 is never taken


def test_days_and_where_parts_begin():
    ax = plot_days(DATA, bins=3)
    assert sum(patch.get_height() for patch in ax.patches) == 7
    began = [line.get_xdata()[0] for line in ax.lines]
    assert began == [np.datetime64(35, "D"), np.datetime64(40, "D")]  # b took 0 last on day 35; a took 2 on day 40
    assert [text.get_text().strip() for text in ax.texts] == ["validation", "test"]
    with pytest.raises(InputError, match="days of these interactions are not known"):
        plot_days(Interactions(["a"], [[0, 1, 2]], 3))


def test_repeats():
    ax = plot_repeats(DATA)
    x, y = ax.lines[0].get_data()
    assert x.tolist() == [2, 3, 4]
    assert y.tolist() == [0, 1, 0]  # both repeat an item in third place
    assert "2 repeats" in ax.get_title()


def test_a_tree_is_bars_of_bars():
    sids = torch.tensor([[0, 0], [0, 1], [0, 1], [1, 0]])
    ax = plot_sid_tree(sids, label=lambda node: "-".join(map(str, node)))
    boxes = [path.get_extents() for path in ax.collections[0].get_paths()]
    widths = sorted((round(-box.y0), box.x0, box.width) for box in boxes)
    assert widths == [(1, 0, 3), (1, 3, 1), (2, 0, 1), (2, 1, 2), (2, 3, 1)]
    assert {text.get_text() for text in ax.texts} == {"0", "1", "0-0", "0-1", "1-0"}
