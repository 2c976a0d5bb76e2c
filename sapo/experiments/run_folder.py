"""Runs on disk: what data they see, what each is, and whether it is finished."""

import glob
import json
import os
import platform
import shutil
import subprocess
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import lru_cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pandas as pd
import torch

from sapo.common.files import drop_halves, write_atomically, write_csv, write_folder_atomically
from sapo.data.catalog import Catalog
from sapo.data.interactions import Interactions, Split, SplitName
from sapo.data.reasoning import ReasoningConfig, ReasoningWorld
from sapo.data.synthetic import SyntheticCatalogue, SyntheticConfig
from sapo.errors import InputError
from sapo.experiments.identity import code_digest, digest, weights_digest
from sapo.experiments.recipes import Recipe
from sapo.semantic_ids.tokenizer import refuse_another_split

MADE = {"reasoning": ReasoningConfig, "synthetic": SyntheticConfig}  # worlds that are made, not read from a folder
# Sources that decide a result; drawing and the command line are not among them.
CODE = (
    *("data", "semantic_ids", "credit", "decoding", "policy", "training", "evaluation", "baselines"),
    *(
        f"experiments/{name}.py"
        for name in ("folders", "recipes", "run_folder", "runner", "stages", "starts", "suite", "systems")
    ),
)

# What `read_runs` tells of a run.
RUN_COLUMNS = [
    *("dataset", "split", "preset", "seed", "method", "status", "updates", "started", "seconds"),
    *("learning_rate", "hardware", "commit", "identity", "data", "weights", "parent"),
]


@lru_cache(maxsize=1)
def code_version() -> str:
    """Hash of the code that decides a result."""
    root = Path(__file__).resolve().parent.parent
    files = [file for part in CODE for file in ([root / part] if part.endswith(".py") else (root / part).rglob("*.py"))]
    return code_digest(file.read_text("utf-8") for file in files)


@dataclass(frozen=True)
class Job:
    """What a worker process needs to know: the recipe, where the data is, where results go."""

    recipe: Recipe
    out: str
    data: str | None = None
    """A folder, or one of MADE; the world of the recipe where None."""
    sids: str = "sids"
    split: SplitName = "auto"
    rationales: str | None = None
    conversations: str | None = None
    code: str = field(default_factory=code_version)

    @property
    def world(self) -> "World":
        return load_world(self)


@dataclass(frozen=True)
class World:
    """A data set as a run sees it."""

    name: str
    catalog: Catalog
    split: Split
    synthetic: ReasoningWorld | SyntheticCatalogue | None


@lru_cache(maxsize=1)
def load_world(job: Job) -> World:
    """Read or make the data of a job; split "auto" takes the published pairs where there are some.

    Raises:
        InputError: data that does not fit; SIDs that know of another split's training sequences.
    """
    if job.data is None or job.data in MADE:
        if job.data is not None and Path(job.data).is_dir():
            raise InputError(f"{job.data!r} is a world that is made, and a folder here: give the folder's whole path.")
        config = job.recipe.world
        if job.data is not None and not isinstance(config, MADE[job.data]):
            config = MADE[job.data]()
        made = ReasoningWorld(config) if isinstance(config, ReasoningConfig) else SyntheticCatalogue(config)
        if job.split == "published_test":
            raise InputError(f"the world {made.catalog.name!r} has no published test pairs: use leave_one_out.")
        return World(made.catalog.name, made.catalog, made.split, made)
    catalog = Catalog.load(job.data, job.sids)
    split = Interactions.load(job.data).split(job.split)
    refuse_another_split(job.data, job.sids, split)
    name = Path(job.data).resolve().name + ("" if job.sids == "sids" else f"-{job.sids.removeprefix('sids_')}")
    return World(name, catalog, split, None)


class RunFolder:
    """One run on disk: `run.json` says what it is and whether it is finished.

    Args:
        job: names the data set, split and preset, which are folders above this one.
        name: folder of the run, for instance "seed0/sapo-lr0.001". The identity's first digits are appended, so runs of
            different settings live side by side.
        config: everything that decides the result beside data and code.
    """

    def __init__(self, job: Job, name: str, seed: int, method: str, config: dict[str, Any]):
        world = job.world
        self.seed = seed
        self.row = {
            "dataset": world.name,
            "split": world.split.name,
            "method": method,
            "preset": job.recipe.preset,
            "seed": seed,
        }
        self.data = digest(world.split.data_hash, world.catalog.content_hash)
        self.identity = digest(config, world.split.data_hash, world.catalog.content_hash, job.code, name)
        group, runs = f"{world.name}-{world.split.name}-", Path(job.out) / "runs"
        self.path = runs / f"{group}{job.recipe.preset}" / f"{name}-{self.identity[:8]}"
        self.twins = (runs, f"{glob.escape(group)}*/{glob.escape(name)}-{self.identity[:8]}")
        self.config = config

    @property
    def policy(self) -> Path:
        return self.path / "policy"

    @property
    def manifest(self) -> dict[str, Any]:
        return _manifest(self.path)

    @property
    def finished(self) -> bool:
        """Nothing is left to do; a run that diverged is finished too, without metrics."""
        return self.manifest.get("status") in ("finished", "diverged")

    @property
    def diverged(self) -> bool:
        return self.manifest.get("status") == "diverged"

    def give_up(self, error: FloatingPointError) -> None:
        """Mark the run as diverged, which a learning rate of a grid may well do."""
        for part in ("checkpoints", "policy"):
            shutil.rmtree(self.path / part, ignore_errors=True)
        self._write(status="diverged", error=str(error))

    def take_over(self) -> bool:
        """Copy the finished run of the same identity that another preset has; returns whether there is one."""
        root, pattern = self.twins
        for twin in sorted(root.glob(pattern)):
            manifest = _manifest(twin)
            if twin != self.path and manifest.get("status") == "finished" and manifest["identity"] == self.identity:
                break
        else:
            return False
        with write_folder_atomically(self.path) as folder:
            shutil.copytree(twin, folder, dirs_exist_ok=True)
            for path in (*folder.glob("*.csv"), *folder.glob("*.csv.gz")):
                if "preset" in (table := pd.read_csv(path)):
                    write_csv(table.assign(preset=self.row["preset"]), path)
            if (card := folder / "policy" / "README.md").is_file():
                text = card.read_text("utf-8")
                theirs, ours = (f", preset {row['preset']}. Code" for row in (manifest, self.row))
                card.write_text(text.replace(theirs, ours, 1), "utf-8")
            (folder / "run.json").write_text(json.dumps(manifest | self.row, indent=1) + "\n")
        return True

    def start(self, updates: int = 0) -> bool:
        """Claim the folder; returns whether a stopped run has left a checkpoint to resume from.

        Transformers' trainer makes one more update when it resumes at the last one of `updates`, so that checkpoint is
        dropped: the one before it is still there.
        """
        if not self.manifest:
            self.path.mkdir(parents=True, exist_ok=True)
            self._write(status="running", started=datetime.now(UTC).isoformat(timespec="seconds"))
        self.clear()
        whole = []
        for checkpoint in sorted(self.path.glob("checkpoints/checkpoint-*")):
            if _is_json(checkpoint / "trainer_state.json") and checkpoint.name != f"checkpoint-{updates}":
                whole.append(checkpoint)
            else:
                shutil.rmtree(checkpoint)
        return bool(whole)

    def clear(self) -> None:
        """Drop what a run that was killed left half-written."""
        drop_halves(self.path.rglob(".partial-*"))

    def finish(
        self,
        seconds: float,
        updates: int,
        metrics: dict[str, float],
        counts: dict[str, int],
        parent: "RunFolder | None" = None,
    ) -> None:
        """Write the metrics, mark the run finished, remove its checkpoints, in this order: a stop costs nothing.

        Args:
            parent: the run that it went on from; its weights are told, so that rows of another one can be found out.
        """
        table = self.results("measured", {**metrics, "updates": updates})
        write_csv(table.assign(n=table["metric"].map(counts)), self.path / "metrics.csv")
        weights = {"weights": weights_digest(self.policy)}
        if parent is not None:
            weights["parent"] = weights_digest(parent.policy)
        self._write(status="finished", seconds=round(seconds, 1), updates=updates, **weights)
        shutil.rmtree(self.path / "checkpoints", ignore_errors=True)

    def table(self, name: str) -> pd.DataFrame:
        """A CSV of this run with the columns that tell it from others in front."""
        table = pd.read_csv(self.path / name)
        for column in ("seed", "method", "preset", "split", "dataset"):
            if column not in table:
                table.insert(0, column, self.row[column])
        return table

    def results(self, source: str, metrics: dict[str, float], rows: int | None = None) -> pd.DataFrame:
        """Metrics of this run as rows of results.csv."""
        table = pd.DataFrame({"metric": list(metrics), "value": list(metrics.values())})
        return table.assign(source=source, **self.row, n=rows, run=self.path.name)

    def write_card(self, metrics: dict[str, float]) -> None:
        """What this checkpoint is, beside it: data, split, recipe, metrics, limits."""
        lines = [
            f"# {self.row['method']}, seed {self.row['seed']}",
            "",
            "Data: {dataset}, split {split}, preset {preset}.".format(**self.row) + f" Code: sapo {version('sapo')}.",
            "",
            "It recommends items of this catalogue alone, was trained at small scale for research, and must not be "
            "evaluated on another split of the data: its training rows may hold those targets.",
            "",
            "Validation: "
            + (", ".join(f"{name} {value:.4f}" for name, value in sorted(metrics.items())) or "not evaluated")
            + ".",
            "",
            "Recipe:",
            "",
            *(f"    {line}" for line in json.dumps(self.config, indent=1).splitlines()),
        ]
        with write_atomically(self.policy / "README.md") as path:
            path.write_text("\n".join(lines) + "\n", "utf-8")

    def _write(self, **more: Any) -> None:
        manifest = {
            **self.row,
            "identity": self.identity,
            "data": self.data,
            "config": self.config,
            **self.manifest,
            **more,
            **provenance(),
        }
        with write_atomically(self.path / "run.json") as path:
            path.write_text(json.dumps(manifest, indent=1) + "\n")


def _manifest(folder: Path) -> dict[str, Any]:
    try:
        return json.loads((folder / "run.json").read_text())
    except FileNotFoundError:
        return {}


def _is_json(path: Path) -> bool:
    """Whether a file is there and whole; the trainer writes this one last of a checkpoint."""
    try:
        json.loads(path.read_text("utf-8"))
    except (FileNotFoundError, ValueError):
        return False
    return True


def read_runs(out: Path) -> pd.DataFrame:
    """What every run under OUT says of itself, a row a run; an unfinished one is listed as such.

    Raises:
        InputError: a run.json that is not JSON.
    """
    runs = []
    for path in sorted((out / "runs").glob("**/run.json")):
        try:
            run = json.loads(path.read_text(encoding="utf-8"))
            run["learning_rate"] = run.get("config", {}).get("learning_rate")
        except (UnicodeDecodeError, json.JSONDecodeError, AttributeError, RecursionError) as error:
            raise InputError(f"{path}: not a run's manifest: {error}") from None
        runs.append({"run": path.parent.relative_to(out).as_posix()} | {name: run.get(name) for name in RUN_COLUMNS})
    return pd.DataFrame(runs, columns=["run", *RUN_COLUMNS], dtype=object)


def read_recorded_runs(record: Path) -> pd.DataFrame:
    """The same of the runs that `sapo publish` recorded; none where it never did."""
    path = record / "runs.csv"
    return pd.read_csv(path, dtype=object) if path.is_file() else pd.DataFrame(columns=["run", *RUN_COLUMNS])


@lru_cache(maxsize=1)
def provenance() -> dict[str, Any]:
    """Where and with what a run is made."""
    root = Path(__file__).resolve().parent.parent.parent
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {
        "hardware": gpu or f"{platform.machine()} CPU, {os.cpu_count()} cores",
        "versions": {name: version(name) for name in ("sapo", "torch", "transformers", "trl")}
        | {"python": platform.python_version()},
        "commit": _commit(root),
        "code": code_version(),
    }


def _commit(root: Path) -> str | None:
    """The commit of sapo's own checkout, marked where files differ from it; None elsewhere (a repository may surround a
    virtual environment) or without git."""
    answers = []
    for command in (["rev-parse", "--show-toplevel"], ["rev-parse", "HEAD"], ["status", "--porcelain", "-uno"]):
        try:
            answer = subprocess.run(["git", *command], cwd=root, capture_output=True, text=True, check=True)
        except (FileNotFoundError, subprocess.CalledProcessError):
            return None
        answers.append(answer.stdout.strip())
    top, commit, changes = answers
    if Path(top).resolve() != root:
        return None
    return f"{commit}-dirty" if changes else commit
