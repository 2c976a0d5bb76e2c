"""Conversations about anything, mixed into stage 1 so that a pretrained model goes on talking and reasoning as it did.

The paper's fork (zhengzaiyi/SIDReasoner) mixes 60,000 of them with the rows of a data set.
"""

import json
from dataclasses import dataclass
from pathlib import Path

from sapo.common.files import read_lines
from sapo.errors import InputError

ROLES = ("system", "user", "assistant")


@dataclass(frozen=True)
class Conversation:
    """What was said, and the answer that is learnt."""

    turns: list[dict[str, str]]
    """Role and content of each turn before the answer."""
    answer: str


def read_conversations(path: str | Path) -> list[Conversation]:
    """JSON lines whose `messages` are turns, {"role": ..., "content": ...}; the last one, an assistant's, is learnt.

    Raises:
        InputError: no such file, no line, a line that is no conversation; the message names the line.
    """
    path = Path(path)
    if not path.is_file():
        raise InputError(f"{path} is not a file; it holds conversations as JSON lines.")
    found = []
    with path.open("rb") as file:
        for number, line in enumerate(read_lines(file, path), start=1):
            if line.strip():
                found.append(_conversation(line, f"{path}, line {number}"))
    if not found:
        raise InputError(f"{path} has no conversation.")
    return found


def _conversation(line: bytes, where: str) -> Conversation:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{where}: no JSON ({error}).") from error
    turns = record.get("messages") if isinstance(record, dict) else None
    if not isinstance(turns, list) or len(turns) < 2:
        raise InputError(f"{where}: 'messages' is a list of two turns or more.")
    for turn in turns:
        if not isinstance(turn, dict) or turn.get("role") not in ROLES or not isinstance(turn.get("content"), str):
            raise InputError(f"{where}: a turn has a role ({', '.join(ROLES)}) and a content of text.")
    *before, last = [{"role": turn["role"], "content": turn["content"]} for turn in turns]
    if last["role"] != "assistant" or not last["content"].strip():
        raise InputError(f"{where}: the last turn is what is learnt; it is the assistant's, and not empty.")
    return Conversation(before, last["content"])
