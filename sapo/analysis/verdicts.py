"""Numbers as sentences: who is ahead, as far as an interval tells.

A sentence follows from its numbers alone, so that a page made of such sentences says what was measured whichever way it
came out.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Literal

from sapo.analysis.statistics import Interval

Verdict = Literal["ahead", "behind", "equal", "not told apart", "unknown"]


def judge(gain: Interval) -> Verdict:
    """What an interval of a difference says of its sign: "equal" where all replicates agree on no difference, "unknown"
    where one replicate leaves no interval."""
    if math.isnan(gain.low) or math.isnan(gain.high):
        return "unknown"
    if gain.low > 0:
        return "ahead"
    if gain.high < 0:
        return "behind"
    return "equal" if gain.low == gain.high else "not told apart"


def signed(gain: Interval, digits: int = 3) -> str:
    """A difference with its interval, "+0.002 [-0.009, +0.012]"; without one where it is not known."""
    value = f"{gain.value:+.{digits}f}"
    if math.isnan(gain.low):
        return value
    return f"{value} [{gain.low:+.{digits}f}, {gain.high:+.{digits}f}]"


def mean_half(interval: Interval, digits: int = 3) -> str:
    """A mean with half the width of its interval, "0.492 ± 0.032"; the mean alone where there is no interval."""
    half = "" if math.isnan(interval.half) else f" ± {interval.half:.{digits}f}"
    return f"{interval.value:.{digits}f}{half}"


def times(ratio: Interval) -> str:
    """A ratio with its interval to three significant digits, "1.70 [1.52, 1.89]"."""
    value, low, high = (_three_digits(bound) for bound in ratio)
    return value if math.isnan(ratio.low) else f"{value} [{low}, {high}]"


def comparison(one: str, other: str, metric: str, gain: Interval, over: str, digits: int = 3) -> str:
    """The verdict on a pair, "SAPO - GRPO in NDCG@10: +0.002 [-0.009, +0.012] over 3 seeds: not told apart."

    Args:
        gain: of one over the other.
        over: the replicates, such as "3 seeds".
    """
    words = {
        "ahead": f"{one} is ahead",
        "behind": f"{other} is ahead",
        "equal": "the same every time",
        "not told apart": "not told apart",
        "unknown": "no interval, so no verdict",
    }
    return f"{one} - {other} in {metric}: {signed(gain, digits)} over {over}: {words[judge(gain)]}."


def tally(gains: Mapping[str, Interval], other: str, metric: str) -> str:
    """How many of several methods are ahead of another one, by name, and how many cannot be told apart from it.

    Args:
        gains: of each method over `other`, not corrected for their number.
    """
    words: dict[Verdict, str] = {
        "ahead": "ahead are",
        "behind": "behind are",
        "unknown": "without an interval are",
    }
    said = []
    for verdict, start in words.items():
        names = [f"{name} ({signed(gain)})" for name, gain in gains.items() if judge(gain) == verdict]
        said += [f"{start} {listed(names)}"] if names else []
    rest = sum(judge(gain) not in words for gain in gains.values())
    said.append(f"{rest} cannot be told apart from it")
    methods = "method" if len(gains) == 1 else "methods"
    return f"Of {len(gains)} {methods} beside {other} in {metric}, without a correction for their number: " + (
        "; ".join(said) + "."
    )


def sides(gains: Mapping[str, Interval], one: str, other: str) -> str:
    """Where each of two methods ranks better, in words without numbers: "A ranks better than B on X; A and B cannot be
    told apart on Y and Z".

    Args:
        gains: of `one` over `other`, by the name of the data.
    """
    words: dict[Verdict, str] = {
        "ahead": f"{one} ranks better than {other} on",
        "behind": f"{other} ranks better than {one} on",
        "not told apart": f"{one} and {other} cannot be told apart on",
        "equal": f"{one} and {other} are the same on",
        "unknown": f"a single seed says nothing of {one} and {other} on",
    }
    by_verdict = {verdict: [name for name, gain in gains.items() if judge(gain) == verdict] for verdict in words}
    return "; ".join(f"{words[verdict]} {listed(names)}" for verdict, names in by_verdict.items() if names)


def listed(names: Sequence[str]) -> str:
    """Names in a row, the last after "and"."""
    return " and ".join([", ".join(names[:-1]), names[-1]] if len(names) > 1 else names)


def _three_digits(value: float) -> str:
    rounded = float(f"{value:.3g}")  # which may have reached the next power of ten
    if not math.isfinite(rounded) or rounded == 0:
        return f"{rounded:g}"
    return f"{rounded:.{max(0, 2 - math.floor(math.log10(abs(rounded))))}f}"
