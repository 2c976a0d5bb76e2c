"""Token strips: a completion as boxes, each shaded by the credit its token gets. Blue is praise, red is blame."""

import html
from collections.abc import Sequence

import numpy as np
from matplotlib import colormaps
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.colors import to_hex
from matplotlib.patches import Rectangle

from sapo.analysis.style import FULL_WIDTH, credit_color
from sapo.errors import InputError

COLORMAP = colormaps["RdBu"]
_ADVANCE = 0.602  # width of a DejaVu Sans Mono character / font size
_PADDING = 0.55  # left and right of a token together / font size
_LINE = 2.7  # height of a line of tokens, its step numbers and the space below / font size


def token_strip(
    tokens: Sequence[str],
    values: Sequence[float] | np.ndarray,
    steps: Sequence[int] | None = None,
    ax: Axes | None = None,
    limit: float | None = None,
) -> Axes:
    """Draw tokens as boxes from left to right, wrapped to the width of the axes.

    Args:
        tokens: text of every token; line breaks and tabs are shown as such.
        values: credit of every token, shaded on a diverging scale centred at 0.
        steps: step of every token, -1 for none: a bar under the token and the step's number where it begins.
        ax: its size now is the room there is, and the text shrinks to fit; None makes a figure of the right height.
        limit: credit of the fullest shade, the same for strips that are compared; the largest of `values` where None.

    Raises:
        InputError: lengths that differ, no tokens, a value that is not finite or beyond `limit`.
    """
    shades = _shades(tokens, values, limit)
    if steps is not None and len(steps) != len(tokens):
        raise InputError(f"{len(steps)} steps for {len(tokens)} tokens: give one a token.")
    labels = [_visible(token) for token in tokens]
    size = 7.0
    if ax is None:
        width = FULL_WIDTH * 72
        places = _wrap(labels, width, size)
        height = (places[-1][1] + 1) * _LINE * size
        figure = plt.figure(figsize=(FULL_WIDTH, height / 72), layout="none")
        ax = figure.add_axes((0.0, 0.0, 1.0, 1.0))
    else:
        extent = ax.get_window_extent()
        width, height = (72 * pixels / ax.figure.get_dpi() for pixels in (extent.width, extent.height))
        places = _wrap(labels, width, size)
        while size > 2 and (places[-1][1] + 1) * _LINE * size > height:
            size -= 0.25
            places = _wrap(labels, width, size)
    ax.set_axis_off()
    ax.set_xlim(0, width)  # data units are points
    ax.set_ylim(-height, 0)
    for index, ((left, line), label, shade) in enumerate(zip(places, labels, shades, strict=True)):
        bottom, box = -(line * _LINE + 1.65) * size, _advance(label, size)
        ax.add_patch(Rectangle((left, bottom), box, 1.5 * size, facecolor=shade, edgecolor="white", linewidth=0.8))
        ax.text(
            left + box / 2,
            bottom + 0.72 * size,
            label,
            ha="center",
            va="center",
            family="DejaVu Sans Mono",
            fontsize=size,
            color=_ink(shade),
            parse_math=False,
        )
        if steps is not None and steps[index] >= 0:
            color = credit_color(f"step {steps[index] + 1}")
            ax.add_patch(Rectangle((left, bottom - 0.3 * size), box, 0.2 * size, facecolor=color, linewidth=0))
            if index == 0 or steps[index] != steps[index - 1]:
                ax.text(
                    left, bottom - 0.34 * size, str(steps[index] + 1), va="top", fontsize=0.62 * size, color="#4d4d4d"
                )
    return ax


def token_strip_html(tokens: Sequence[str], values: Sequence[float] | np.ndarray) -> str:
    """The same for a notebook: one HTML fragment, text escaped, the credit as a tooltip."""
    spans = [
        f'<span title="{value:+.3f}" style="background:{shade};color:{_ink(shade)};padding:1px 3px;margin:1px;'
        f'border-radius:3px;display:inline-block;white-space:pre">{html.escape(_visible(token))}</span>'
        for token, value, shade in zip(tokens, values, _shades(tokens, values), strict=True)
    ]
    return '<div style="font-family:monospace;line-height:1.7">' + "".join(spans) + "</div>"


def _shades(tokens: Sequence[str], values: Sequence[float] | np.ndarray, limit: float | None = None) -> list[str]:
    credit = np.asarray(values, dtype=np.float64)
    if not len(tokens) or credit.shape != (len(tokens),) or not np.isfinite(credit).all():
        raise InputError(f"{len(tokens)} tokens and values of shape {credit.shape}: give one finite value a token.")
    largest = float(np.abs(credit).max())
    if limit is not None and largest > limit:
        raise InputError(f"limit is {limit}, and a token has credit {largest:.3g} or its negative.")
    limit = limit or largest or 1.0
    return [to_hex(COLORMAP(0.5 + 0.38 * share)) for share in credit / limit]  # the ends of the map hide the text


def _ink(shade: str) -> str:
    red, green, blue = (int(shade[place : place + 2], 16) for place in (1, 3, 5))
    return "#000000" if 0.299 * red + 0.587 * green + 0.114 * blue > 120 else "#ffffff"


def _visible(token: str) -> str:
    return token.replace("\n", "↵").replace("\t", "⇥").replace("\r", "") or "∅"


def _advance(label: str, size: float) -> float:
    return (_ADVANCE * len(label) + _PADDING) * size


def _wrap(labels: list[str], width: float, size: float) -> list[tuple[float, int]]:
    """Left edge (points) and line of every token. A token wider than a line stands alone on its own."""
    margin = 1.0
    places, left, line = [], margin, 0
    for label in labels:
        advance = _advance(label, size)
        if left > margin and left + advance > width - margin:
            left, line = margin, line + 1
        places.append((left, line))
        left += advance
    return places
