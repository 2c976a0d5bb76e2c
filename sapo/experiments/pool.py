"""A crew of worker processes that do tasks in the order of what they need, and stop cleanly on Ctrl-C."""

import os
import signal
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from multiprocessing import get_context
from typing import Any

import torch
import transformers
from threadpoolctl import threadpool_limits

from sapo.common import distributed
from sapo.common.progress import keep_to_line
from sapo.errors import InputError

# glibc gives freed memory back to the system and asks for it again, page by page: a tenth of a small model's update.
# Read when a process starts, so by workers; other C libraries know no such names.
KEEPS_FREED_MEMORY = {"MALLOC_MMAP_THRESHOLD_": str(2**32), "MALLOC_TRIM_THRESHOLD_": str(2**34)}


@dataclass(frozen=True, eq=False)
class Task:
    """A function of picklable arguments, to be called once the tasks it needs are done, unless it is done already."""

    function: Callable[..., None]
    arguments: tuple[Any, ...]
    done: bool
    needs: tuple["Task", ...] = ()
    together: bool = False
    """Whether all processes of `accelerate launch` do it, sharing the work, or the first alone."""


class Crew:
    """Worker processes with one thread each; no process where there is a single worker or nothing to do.

    Args:
        workers: processes side by side (small models gain nothing from more threads); by default the number of cores,
            at most 4, and 1 where a GPU would be shared. Under `accelerate launch` its processes do one task at a time.

    Raises:
        InputError: workers under `accelerate launch`.
    """

    def __init__(self, workers: int | None = None):
        if workers not in (None, 1) and distributed.count() > 1:
            raise InputError(
                f"{workers} workers do tasks side by side; {distributed.count()} processes share each task."
            )
        alone = distributed.count() > 1 or torch.cuda.is_available()
        self.workers = workers or (1 if alone else min(4, os.cpu_count() or 1))
        self.pool: ProcessPoolExecutor | None = None

    def __enter__(self) -> "Crew":
        return self

    def __exit__(self, *error: object) -> None:
        if self.pool is not None:
            self.pool.shutdown(wait=True, cancel_futures=True)

    def work(self, tasks: Sequence[Task], tell: Callable[[int, int], None] | None = None) -> None:
        """Call all that are not done, in the order given as far as what they need allows; the first error ends it.

        Args:
            tell: is told after each task how many are done, of how many.
        """
        done = {task for task in tasks if task.done}
        todo = [task for task in tasks if not task.done]
        if self.workers == 1:
            distributed.wait()  # none looks at what is done while another still writes
            with _quiet_and_single_threaded():
                for task in todo:
                    if task.together or distributed.is_first():
                        task.function(*task.arguments)
                    distributed.wait()
                    done.add(task)
                    if tell is not None:
                        tell(len(done), len(tasks))
            return
        running: dict[Future, Task] = {}
        while todo or running:
            for task in [task for task in todo if done.issuperset(task.needs)]:
                if self.pool is None:
                    # A worker of the spawn kind imports everything afresh: torch's threads do not survive a fork.
                    spawn = get_context("spawn")
                    for name, value in KEEPS_FREED_MEMORY.items():
                        os.environ.setdefault(name, value)
                    self.pool = ProcessPoolExecutor(self.workers, spawn, _start_worker, (spawn.Value("i", 0),))
                with _interrupts_held_back():
                    future = self.pool.submit(_Worker.call, task.function, *task.arguments)
                running[future] = task
                todo.remove(task)
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                future.result()
                done.add(running.pop(future))
                if tell is not None:
                    tell(len(done), len(tasks))


@contextmanager
def _quiet_and_single_threaded() -> Iterator[None]:
    """One thread, so that numbers do not depend on the machine's cores; and no bars beside our own."""
    import scipy.linalg  # noqa: F401  the limit below is of libraries that are there
    import sklearn  # noqa: F401

    transformers.utils.logging.disable_progress_bar()
    warnings.filterwarnings("ignore", message=".*activation_checkpointing.*", category=FutureWarning)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with threadpool_limits(1):  # what numpy and scipy calculate with
            yield
    finally:
        torch.set_num_threads(threads)


@contextmanager
def _interrupts_held_back() -> Iterator[None]:
    """Ctrl-C waits. A worker born inside starts with it waiting too, so none meets it half imported."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _start_worker(counter: Any) -> None:
    _Worker.threads.enter_context(_quiet_and_single_threaded())  # for as long as it lives
    with counter.get_lock():
        keep_to_line(counter.value)
        counter.value += 1
    signal.signal(signal.SIGINT, _Worker.interrupt)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})


class _Worker:
    """What a worker process knows of Ctrl-C: it ends the task at hand, and an idle worker begins no other."""

    busy = False
    stopped = False
    threads = ExitStack()

    @classmethod
    def interrupt(cls, *signal_and_frame: object) -> None:
        cls.stopped = True
        if cls.busy:
            raise KeyboardInterrupt

    @classmethod
    def call(cls, function: Callable[..., None], *arguments: Any) -> None:
        try:
            cls.busy = True
            if cls.stopped:
                raise KeyboardInterrupt
            function(*arguments)
        finally:
            cls.busy = False
