"""Token strips: shades, wrapping, and text that is never taken for markup."""

import itertools

import matplotlib as mpl
import numpy as np
import pytest
from matplotlib import pyplot as plt
from matplotlib.colors import to_rgb

from sapo.analysis.style import credit_color
from sapo.analysis.tokens import token_strip, token_strip_html
from sapo.errors import InputError

TOKENS = ["<think>", "printer", "$ink$ \\n", "</think>", "\n", "<a_12>", ""]
VALUES = [1.0, 1.0, -2.0, 0.5, 0.0, -2.0, 0.0]
STEPS = [0, 0, 0, 0, -1, 0, -1]


@pytest.fixture(autouse=True)
def close_figures():
    backend = mpl.get_backend()
    mpl.use("Agg")
    yield
    plt.close("all")
    mpl.use(backend)


def assert_readable(ax) -> None:
    """All text on the figure, none on another."""
    ax.figure.canvas.draw()
    boxes = [text.get_window_extent() for text in ax.texts]
    page = ax.figure.bbox
    for box in boxes:
        assert box.x0 >= page.x0 - 1
        assert box.y0 >= page.y0 - 1
        assert box.x1 <= page.x1 + 1
        assert box.y1 <= page.y1 + 1
    for one, other in itertools.combinations(boxes, 2):
        assert not one.overlaps(other)


def test_shades_are_centred_at_zero():
    ax = token_strip(TOKENS, VALUES)
    red, _, blue = np.array([patch.get_facecolor()[:3] for patch in ax.patches]).T
    assert len(ax.patches) == len(TOKENS)
    for index, value in enumerate(VALUES):
        if value > 0:
            assert blue[index] > red[index]
        elif value < 0:
            assert red[index] > blue[index]
        else:
            assert red[index] == pytest.approx(blue[index], abs=0.01)
    assert blue[0] - red[0] > blue[3] - red[3]  # 1 is a stronger blue than 1/2
    assert_readable(ax)


def test_no_credit_is_no_colour():
    ax = token_strip(["a", "b"], [0.0, 0.0])
    assert np.ptp(ax.patches[0].get_facecolor()[:3]) < 0.02


def test_steps_are_underlined_and_numbered_where_they_begin():
    ax = token_strip(TOKENS, VALUES, STEPS)
    underlines = [patch for patch in ax.patches if np.allclose(patch.get_facecolor()[:3], credit_color("step 1"))]
    assert len(underlines) == 5  # the tokens of step 1; two have none
    assert sum(text.get_text() == "1" for text in ax.texts) == 2  # the block, and the SID token after the line break
    assert_readable(ax)


def test_lines_wrap_at_the_width():
    ax = token_strip(["recommend"] * 40, np.linspace(-1, 1, 40))
    lefts = [patch.get_x() for patch in ax.patches]
    bottoms = sorted({round(patch.get_y(), 6) for patch in ax.patches})
    assert len(bottoms) > 2
    assert all(patch.get_x() + patch.get_width() <= ax.get_xlim()[1] for patch in ax.patches)
    assert lefts.count(min(lefts)) == len(bottoms)
    assert_readable(ax)


def test_text_shrinks_into_given_axes():
    small, large = (
        token_strip(["recommend"] * 60, [0.5] * 60, ax=plt.subplots(figsize=(3, height))[1]) for height in (1, 8)
    )
    assert small.texts[0].get_fontsize() < large.texts[0].get_fontsize() == 7
    for ax in (small, large):
        assert ax.patches[-1].get_y() >= ax.get_ylim()[0]
        assert_readable(ax)


def test_markup_is_text():
    ax = token_strip(["$\\frac{$", "a\nb\t"], [1.0, -1.0])
    assert [text.get_text() for text in ax.texts] == ["$\\frac{$", "a↵b⇥"]
    ax.figure.canvas.draw()  # would raise if the first were read as mathematics


def test_html_is_escaped():
    page = token_strip_html(['<script>alert("&")</script>', "ok"], [1.0, -0.25])
    assert "<script>" not in page
    assert "&lt;script&gt;alert(&quot;&amp;&quot;)&lt;/script&gt;" in page
    assert 'title="+1.000"' in page
    assert 'title="-0.250"' in page
    assert page.count("<span") == page.count("</span>") == 2


def test_html_and_figure_have_the_same_shades():
    page, ax = token_strip_html(TOKENS, VALUES), token_strip(TOKENS, VALUES)
    shades = [part.split(";")[0] for part in page.split("background:")[1:]]
    assert [to_rgb(shade) for shade in shades] == [patch.get_facecolor()[:3] for patch in ax.patches]


@pytest.mark.parametrize(("tokens", "values"), [([], []), (["a"], [1.0, 2.0]), (["a"], [float("nan")])])
def test_refuses(tokens, values):
    with pytest.raises(InputError, match="one finite value a token"):
        token_strip(tokens, values)
    with pytest.raises(InputError, match="one finite value a token"):
        token_strip_html(tokens, values)


def test_refuses_steps_of_another_length():
    with pytest.raises(InputError, match="2 steps for 1 tokens"):
        token_strip(["a"], [1.0], [0, 0])
    with pytest.raises(InputError, match=r"limit is 0\.5, and a token has credit 1"):
        token_strip(["a"], [-1.0], limit=0.5)


def test_strips_of_one_limit_can_be_compared():
    """The same credit has the same shade, whatever else the strip holds."""
    (alone,) = (patch.get_facecolor() for patch in token_strip(["a"], [0.5], limit=1.0).patches)
    beside = token_strip(["a", "b"], [0.5, -1.0], limit=1.0).patches[0].get_facecolor()
    assert alone == beside
    assert token_strip(["a"], [0.5]).patches[0].get_facecolor() != alone  # by itself, 0.5 is the fullest
