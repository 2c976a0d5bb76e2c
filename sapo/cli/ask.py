"""Commands that ask a trained policy."""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from sapo.cli.options import Split, at_least_one


@dataclass(frozen=True)
class Evaluate:
    """Rank the catalogue for the test or validation rows with a trained policy, and print its metrics."""

    model: Path
    """Folder of a policy, for instance OUT/runs/.../seed0/stage2-.../policy."""
    data: Path | None = None
    """What the policy was trained on: a folder of TSV files, `reasoning` (also where left out) or `synthetic`."""
    sids: str = "sids"
    """Which semantic IDs of the folder."""
    split: Split = "auto"
    """A policy is refused on a split that it was not trained for."""
    rows: Literal["test", "valid"] = "test"
    """Which rows of the split."""
    limit: int | None = None
    """Evaluate so many rows, drawn with a fixed seed; all where left out."""
    thinking: bool | None = None
    """Let the policy think before it names an item; as it was trained where left out."""

    def __call__(self) -> None:
        from sapo.common import distributed
        from sapo.evaluation.evaluate import evaluate_policy
        from sapo.experiments.recipes import QUICK
        from sapo.experiments.run_folder import Job, load_world
        from sapo.policy.policy import Policy

        at_least_one("limit", self.limit)
        data = None if self.data is None else str(self.data)
        world = load_world(Job(QUICK, "", data, self.sids, self.split))
        policy = Policy.load(self.model, world.catalog)
        metrics, users = evaluate_policy(policy, world.split, self.rows, self.limit, thinking=self.thinking)
        if not distributed.is_first():
            return
        print(f"{world.name}, {world.split.name}, {len(users)} {self.rows} rows")
        for name, value in metrics.items():
            print(f"{name:24}{value:.4f}")


@dataclass(frozen=True)
class Recommend:
    """Ask a trained policy what comes next after a history: its thinking and its ranked items."""

    model: Path
    """Folder of a policy, for instance OUT/runs/.../seed0/sapo-lr0.0001-.../policy."""
    history: tuple[str, ...] = ()
    """Items, oldest first, each by title, product id or number (#12 where a product id is spelt like it). Where left
    out, every line of standard input is a JSON list of them, and is answered before the next is read."""
    data: Path | None = None
    """What the policy was trained on: a folder of TSV files, `reasoning` (also where left out) or `synthetic`."""
    sids: str = "sids"
    """Which semantic IDs of the folder."""
    k: int = 10
    """How many items."""
    new: bool = False
    """Leave out the items of the history."""
    json: bool = False
    """A line of JSON an answer, instead of text."""

    def __call__(self) -> None:
        import json
        import os

        from transformers.utils.logging import disable_progress_bar

        from sapo.data.catalog import Catalog
        from sapo.experiments.recipes import QUICK
        from sapo.experiments.run_folder import MADE, Job, load_world
        from sapo.policy.ask import Answer, answer_lines, ask
        from sapo.policy.policy import Policy

        disable_progress_bar()
        data = None if self.data is None else str(self.data)
        if data is None or data in MADE:
            catalog = load_world(Job(QUICK, "", data)).catalog
        else:
            catalog = Catalog.load(data, self.sids)
        policy = Policy.load(self.model, catalog)
        if self.history:
            (answer,) = ask(policy, [self.history], self.k, self.new)
            print(json.dumps(answer.as_dict()) if self.json else answer)
            return
        if sys.stdin.isatty():
            print('sapo: a JSON list of items a line, as ["a title", 12]; Ctrl-D ends.', file=sys.stderr)
        mistakes = 0
        try:
            for number, said in answer_lines(policy, sys.stdin.buffer, self.k, self.new):
                if isinstance(said, Answer):
                    print(json.dumps(said.as_dict()) if self.json else f"{said}\n", flush=True)
                    continue
                mistakes += 1
                if self.json:
                    print(json.dumps({"line": number, "error": str(said)}), flush=True)
                else:
                    print(f"sapo: line {number}: {said}", file=sys.stderr, flush=True)
        except KeyboardInterrupt:
            sys.exit(130)
        except BrokenPipeError:  # who read the answers is gone; what is left to flush has nowhere to go
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            sys.exit(141)
        sys.exit(1 if mistakes else 0)
