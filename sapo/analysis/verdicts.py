"""Numbers as sentences: who is ahead, as far as a test tells.

A sentence follows from its numbers alone, so that a page made of such sentences says what was measured whichever way it
came out. Its interval is that of its own difference; its verdict is what Holm's correction over all differences of the
same list or table leaves.
"""

import math
from collections.abc import Hashable, Mapping, Sequence
from typing import Literal, TypeVar

from sapo.analysis.statistics import Difference, Interval, beyond_noise

Verdict = Literal["ahead", "behind", "equal", "not told apart", "unknown"]
Name = TypeVar("Name", bound=Hashable)


def judge(gains: Mapping[Name, Difference]) -> dict[Name, Verdict]:
    """What the differences of one list or table say of their signs, after Holm's correction over all of them: "equal"
    where all replicates agree on no difference, "unknown" where one replicate leaves nothing to test with.
    """
    tested = {name: gain for name, gain in gains.items() if not math.isnan(gain.p_value)}
    sure = dict(zip(tested, beyond_noise([gain.p_value for gain in tested.values()]), strict=True))
    verdicts: dict[Name, Verdict] = {}
    for name, gain in gains.items():
        if name not in tested:
            verdicts[name] = "unknown"
        elif sure[name]:
            verdicts[name] = "ahead" if gain.value > 0 else "behind"
        else:
            verdicts[name] = "equal" if gain.value == gain.low == gain.high else "not told apart"
    return verdicts


def signed(gain: Interval | Difference, digits: int = 3) -> str:
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


def replicates(gain: Difference) -> str:
    """What an interval is over, "3,000 users and 5 seeds"; "5 seeds" where it holds seeds alone."""
    counts = ((gain.users, "user"), (gain.seeds, "seed"))
    return listed([f"{count:,} {unit}{'s' if count > 1 else ''}" for count, unit in counts if count])


def comparison(one: str, other: str, metric: str, gain: Difference, verdict: Verdict, digits: int = 3) -> str:
    """The verdict on a pair, "SAPO - GRPO in NDCG@10: +0.002 [-0.009, +0.012] over 3 seeds: not told apart."

    Args:
        gain: of one over the other.
        verdict: of `judge`, over everything that stands beside it.
    """
    words: dict[Verdict, str] = {
        "ahead": f"{one} is ahead",
        "behind": f"{other} is ahead",
        "equal": "the same every time",
        "not told apart": "not told apart",
        "unknown": "no interval, so no verdict",
    }
    return f"{one} - {other} in {metric}: {signed(gain, digits)} over {replicates(gain)}: {words[verdict]}."


def tally(gains: Mapping[str, Difference], other: str, metric: str) -> str:
    """How many of several methods are ahead of another one, by name, and how many cannot be told apart from it.

    Args:
        gains: of each method over `other`; verdicts are corrected for their number.
    """
    words: dict[Verdict, str] = {
        "ahead": "ahead are",
        "behind": "behind are",
        "unknown": "without an interval are",
    }
    said, verdicts = [], judge(gains)
    for verdict, start in words.items():
        names = [f"{name} ({signed(gain)})" for name, gain in gains.items() if verdicts[name] == verdict]
        said += [f"{start} {listed(names)}"] if names else []
    rest = sum(verdict not in words for verdict in verdicts.values())
    said.append(f"{rest} cannot be told apart from it")
    methods = "method" if len(gains) == 1 else "methods"
    return f"Of {len(gains)} {methods} beside {other} in {metric}: {'; '.join(said)}."


def sides(verdicts: Mapping[str, Verdict], one: str, other: str) -> str:
    """Where each of two methods ranks better, in words without numbers: "A ranks better than B on X; A and B cannot be
    told apart on Y and Z".

    Args:
        verdicts: on `one` less `other`, by the name of the data.
    """
    words: dict[Verdict, str] = {
        "ahead": f"{one} ranks better than {other} on",
        "behind": f"{other} ranks better than {one} on",
        "not told apart": f"{one} and {other} cannot be told apart on",
        "equal": f"{one} and {other} are the same on",
        "unknown": f"a single seed says nothing of {one} and {other} on",
    }
    by_verdict = {verdict: [name for name, its in verdicts.items() if its == verdict] for verdict in words}
    return "; ".join(f"{words[verdict]} {listed(names)}" for verdict, names in by_verdict.items() if names)


def listed(names: Sequence[str]) -> str:
    """Names in a row, the last after "and"."""
    return " and ".join([", ".join(names[:-1]), names[-1]] if len(names) > 1 else names)


def _three_digits(value: float) -> str:
    rounded = float(f"{value:.3g}")  # which may have reached the next power of ten
    if not math.isfinite(rounded) or rounded == 0:
        return f"{rounded:g}"
    return f"{rounded:.{max(0, 2 - math.floor(math.log10(abs(rounded))))}f}"
