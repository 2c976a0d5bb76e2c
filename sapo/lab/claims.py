"""What the paper and its critics claim, as code: each claim an experiment, a number with an interval, and a verdict.

Verdicts are computed from the numbers. Experiments are exact (the laboratory, over worlds), or read the recorded
rollouts of stage-2 policies (over seeds).
"""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pandas as pd

from sapo.errors import InputError
from sapo.lab.credit_claims import (
    chance_matches,
    division_by_std,
    fixed_steps,
    layout,
    outcome_reward,
    signs,
    sparsity,
    starvation,
)
from sapo.lab.findings import Finding
from sapo.lab.goal_claims import same_maximiser, same_maximiser_on
from sapo.lab.training_claims import TRAINING_CLAIMS

COLUMNS = ["claim", "said_by", "experiment", "value", "low", "high", "verdict", "command"]


def ledger(record: Path, only: int | None = None, data: Sequence[Path] = ()) -> pd.DataFrame:
    """The rows of every claim, or of one, with the command that makes them again.

    Args:
        record: folder with the recorded rollouts.csv.gz and dynamics.csv.gz.
        data: folders of real data, for what claim 4 says of them.

    Raises:
        InputError: no claim of that number, or a record without the tables.
    """
    if only is not None and only not in CLAIMS:
        raise InputError(f"there is no claim {only}; there are {', '.join(map(str, CLAIMS))}.")
    rows = [
        {**vars(finding), "command": f"sapo claims --only {number}"}
        for number, find in CLAIMS.items()
        if only in (None, number)
        for finding in find(record)
    ]
    if only in (None, 4):
        rows += [
            {**vars(finding), "command": f"sapo claims --only 4 --data {folder.resolve().name}"}
            for folder in data
            for finding in same_maximiser_on(folder)
        ]
    return pd.DataFrame(rows, columns=COLUMNS)


CLAIMS: dict[int, Callable[[Path], Iterator[Finding]]] = dict(
    enumerate(
        (
            *(outcome_reward, signs, starvation, same_maximiser, sparsity, chance_matches, division_by_std, layout),
            *TRAINING_CLAIMS,
            fixed_steps,
        ),
        start=1,
    )
)
