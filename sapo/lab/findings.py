"""One row of the ledger of claims, and the verdicts that are computed from its number."""

from dataclasses import dataclass

from sapo.analysis.statistics import Interval

PAPER, REVIEW, OURS = "SAPO (2605.17648)", "a review of the paper", "our question"


@dataclass(frozen=True)
class Finding:
    """One row of the ledger; `low` and `high` bound a 95 % t interval over worlds or seeds, or equal the value."""

    claim: str
    said_by: str
    experiment: str
    value: float
    low: float
    high: float
    verdict: str


def finding(claim: str, said_by: str, experiment: str, interval: Interval, verdict: str) -> Finding:
    return Finding(claim, said_by, experiment, interval.value, interval.low, interval.high, verdict)


def as_share(interval: Interval) -> Interval:
    """The bounds of a t interval, which does not know that a share ends at 0 and 1."""
    return Interval(interval.value, max(interval.low, 0.0), min(interval.high, 1.0))


def beside_half(share: Interval, more: str, less: str) -> str:
    """Whether an interval lies above or below one half."""
    return more if share.low > 0.5 else less if share.high < 0.5 else "undecided"


def seen(share: Interval, what: str) -> str:
    """Whether a share is above 0 beyond doubt."""
    return f"holds, {what}" if share.low > 0 else f"seen, {what}, share uncertain" if share.value > 0 else "not seen"


def against_one(ratio: Interval) -> str:
    if ratio.low > 0.99 and ratio.high < 1.01:
        return "equal within 1 %"
    times = f"{ratio.value:.3g} times"
    if ratio.low > 1:
        return f"holds, {times}"
    return f"fails, {times}" if ratio.high < 1 else "undecided"
