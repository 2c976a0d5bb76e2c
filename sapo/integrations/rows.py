"""Training rows in the form that verl reads."""

from pathlib import Path

import pandas as pd

from sapo.common.files import write_atomically
from sapo.data.interactions import Rows
from sapo.errors import InputError
from sapo.policy.chat import ChatWording
from sapo.policy.policy import Policy


def write_rows(policy: Policy, rows: Rows, path: str | Path) -> None:
    """A parquet file with a row a history: data_source, prompt (chat messages) and reward_model, whose ground truth is
    the target's SID as text.

    Raises:
        InputError: a policy that is not asked in sentences, or whose tokenizer has no chat template.
    """
    wording = policy.wording
    if not isinstance(wording, ChatWording) or wording.tokenizer.chat_template is None:
        raise InputError("verl asks through a chat template: take a policy of `sapo run --preset paper` that has one.")
    table = pd.DataFrame(
        {
            "data_source": policy.catalog.name,
            "prompt": [wording.messages(wording.question(history, thinking=True)) for history in rows.history],
            "reward_model": [{"style": "rule", "ground_truth": wording.name(target)} for target in rows.target],
        }
    )
    with write_atomically(path) as temporary:
        table.to_parquet(temporary, index=False)
