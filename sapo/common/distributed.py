"""One command on several processes, as `accelerate launch` and `torchrun` start them: who does which part.

All processes do the same tasks in the same order. Training and evaluation share the work; what is left is done, and
every file written, by the first.
"""

import atexit
import os
from collections.abc import Callable
from datetime import timedelta
from functools import lru_cache
from typing import TYPE_CHECKING, TypeVar

from sapo.errors import InputError

if TYPE_CHECKING:
    from accelerate import PartialState

Value = TypeVar("Value")


def count() -> int:
    """How many processes there are."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def number() -> int:
    """Which one this is, from 0."""
    return int(os.environ.get("RANK", "0"))


def is_first() -> bool:
    """Whether this is the one that writes."""
    return number() == 0


def in_parts() -> bool:
    """Whether each is to hold a part of the weights (FSDP)."""
    return os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true"


def wait() -> None:
    """Go on when all are here."""
    if count() > 1:
        _state().wait_for_everyone()


def of_first(function: Callable[[], Value]) -> Value:
    """What a function returns that only the first process calls."""
    value = [function() if is_first() else None]
    if count() > 1:
        from accelerate.utils import broadcast_object_list

        _state()
        broadcast_object_list(value)
    return value[0]  # type: ignore[return-value]


def of_all(value: Value) -> list[Value]:
    """Everybody's value, in order."""
    if count() == 1:
        return [value]
    from accelerate.utils import gather_object

    _state()
    gathered: list[Value] = gather_object([value])
    return gathered


def shares(what: str, whole: int, micro: int | None) -> tuple[int, int]:
    """How an update's examples or prompts are shared out: a process reads so many at a time, and so often.

    Raises:
        InputError: processes and micro-batches that do not divide it.
    """
    if count() > 1:
        _state()  # before a trainer asks for its own
    return divide(what, whole, micro, count())


def divide(what: str, whole: int, micro: int | None, among: int) -> tuple[int, int]:
    """The same for any number of processes."""
    own, rest = divmod(whole, among)
    size = own if micro is None else min(micro, own)
    if rest or not size or own % size:
        parts = f"{among} processes" + ("" if micro is None else f" in micro-batches of {micro}")
        raise InputError(f"{whole} {what} an update do not divide among {parts}.")
    return size, own // size


@lru_cache(maxsize=1)
def _state() -> "PartialState":
    """The connection to the others, made when first needed; it also says which GPU is this process's."""
    import torch
    from accelerate import PartialState

    if not torch.accelerator.is_available():  # the trainers look here too, and would go on alone otherwise
        os.environ.setdefault("ACCELERATE_USE_CPU", "true")
    # the others wait while the first does what it does alone
    cpu = os.environ.get("ACCELERATE_USE_CPU", "false").lower() == "true"
    state = PartialState(cpu=cpu, timeout=timedelta(hours=12))
    atexit.register(state.destroy_process_group)  # its threads must not outlive the interpreter
    return state
