"""The command line as a person meets it: help, results, and mistakes that end in one message and exit code 1."""

import gzip
import http.server
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from functools import partial
from pathlib import Path

import pandas as pd
import psutil
import pytest
from test_amazon import raw_files
from test_experiments import TINY

from sapo import cli
from sapo.analysis.results import read_results
from sapo.data import amazon
from sapo.data.catalog import Catalog
from sapo.data.interactions import Interactions
from sapo.data.synthetic import SyntheticCatalogue
from sapo.errors import InputError
from sapo.experiments import recipes
from sapo.lab import claims, sweep
from sapo.policy.backbone import Pretrained


def call(*arguments, **options):
    """Run `sapo` in a process of its own."""
    command = [sys.executable, "-m", "sapo.cli", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False, **options)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A data folder on disk."""
    path = tmp_path_factory.mktemp("data") / "shop"
    world = SyntheticCatalogue(TINY.world)
    world.catalog.save(path)
    world.interactions.save(path)
    return path


@pytest.fixture
def tiny(monkeypatch):
    """`sapo run` with a recipe of seconds, in this process."""
    monkeypatch.setattr(recipes, "preset", lambda name, data: TINY)
    monkeypatch.setattr(recipes, "QUICK", TINY)

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["sapo", *map(str, arguments)])
        cli.main()

    return run


@pytest.mark.parametrize(
    "command",
    ["run", "study", "baselines", "evaluate", "recommend", "plan", "figures", "publish", "claims", "lab", "data"],
)
def test_help_says_what_a_command_does(command):
    answer = call(command, "--help")
    assert answer.returncode == 0
    assert len(answer.stdout.splitlines()) > 8
    listed = call("--help")
    assert command in listed.stdout


def test_a_terminal_of_another_alphabet_shows_what_it_can():
    answer = call("data", "--help", env=os.environ | {"PYTHONIOENCODING": "latin-1"})
    assert answer.returncode == 0
    assert "describe" in answer.stdout


def test_describe(folder):
    answer = call("data", "describe", folder)
    assert answer.returncode == 0
    assert "items" in answer.stdout
    assert "leave_one_out: test rows" in answer.stdout


def test_run_evaluate_publish_figures(tiny, folder, tmp_path, capsys):
    out = tmp_path / "out"
    options = [
        "--data",
        folder,
        "--out",
        out,
        "--seeds",
        1,
        "--objectives",
        "sapo",
        "grpo",
        "--ablations",
        "--workers",
        1,
    ]
    tiny("run", *options)
    shown = capsys.readouterr().out
    assert "optimum" not in shown  # nobody knows the optimum of data in a folder
    kept = read_results(out / "results.csv").set_index(["method", "metric"])["value"]
    for method, (by_item, by_sid) in {"sapo": ("item/", ""), "popularity": ("", "sid/")}.items():
        (means,) = (line.split()[1:] for line in shown.splitlines() if line.startswith(f"{method} "))
        names = [f"{hit}{name}@10" for hit in (by_item, by_sid) for name in ("recall", "ndcg")]
        assert [float(mean) for mean in means] == pytest.approx([kept[method, name] for name in names], abs=1e-4)
    policy = next(out.glob("runs/shop-leave_one_out-quick/seed0/stage2-*/policy"))
    tiny("evaluate", "--model", policy, "--data", folder, "--limit", 10)
    assert "recall@10" in capsys.readouterr().out
    tiny("publish", "--out", out, "--to", tmp_path / "record")
    assert (tmp_path / "record" / "results.csv").is_file()
    tiny("figures", "--out", out)
    assert (out / "index.html").is_file()
    assert list(out.glob("figures/*.png"))
    assert list(out.glob("tables/*.tex"))


def test_a_policy_is_refused_on_other_data(tiny, folder, tmp_path):
    tiny("run", "--out", tmp_path, "--seeds", 1, "--objectives", "sapo", "--ablations", "--workers", 1)
    policy = next(tmp_path.glob("runs/*/seed0/stage2-*/policy"))
    lines = gzip.decompress((folder / "sequences.tsv.gz").read_bytes()).decode().splitlines()
    other = tmp_path / "shop"
    other.mkdir()
    for name in ("items.tsv.gz", "sids.tsv.gz"):
        (other / name).write_bytes((folder / name).read_bytes())
    (other / "sequences.tsv.gz").write_bytes(gzip.compress("\n".join(lines[:-1]).encode()))
    with pytest.raises(SystemExit, match="its training rows may hold these targets"):
        tiny("evaluate", "--model", policy, "--data", other)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["data", "describe", "no/such/folder"], "is not a folder"),
        (["run", "--data", "no/such/folder", "--out", "{tmp}"], "is not a folder"),
        (["run", "--seeds", "0", "--out", "{tmp}"], "--seeds is 0"),
        (["run", "--objectives", "nonsense", "--out", "{tmp}"], "unknown objectives"),
        (["run", "--split", "published_test", "--out", "{tmp}"], "no published test pairs"),
        (["run", "--lora", "8", "--out", "{tmp}"], "--preset quick trains small models; --lora is of --preset paper"),
        (["run", "--preset", "paper", "--backbone", "./no", "--out", "{tmp}"], "'./no' is no folder, and names on"),
        (["run", "--fraction", "1.5", "--out", "{tmp}"], "fraction is 1.5"),
        (["plan", "--backbone", "{tmp}"], "has no config.json"),
        (["plan", "--gpus", "1", "3"], "--gpus 3: 1024 examples an update do not divide among 3 processes"),
        (["plan", "--lora", "0"], "--lora is 0; at least 1 fits"),
        (["evaluate", "--model", "no/such/folder"], "is no policy folder"),
        (["publish", "--out", "no/such/folder"], "holds no results.csv"),
        (["run", "--no-such-option"], "no-such-option"),
    ],
)
def test_mistakes_end_in_one_message(arguments, message, tmp_path):
    answer = call(*(argument.format(tmp=tmp_path) for argument in arguments))
    assert answer.returncode != 0
    assert message in answer.stderr + answer.stdout
    assert "Traceback" not in answer.stderr
    assert not list(tmp_path.glob("**/results.csv"))


def test_the_paper_preset_takes_its_updates_from_the_data(folder, monkeypatch, tmp_path):
    jobs = []

    def run(job, workers):
        jobs.append(job)
        world = {"source": "measured", "dataset": "shop", "split": "leave_one_out", "preset": "paper"}
        return pd.DataFrame([{**world, "method": "sapo", "metric": "ndcg@10", "value": 0.5}])

    monkeypatch.setattr("sapo.experiments.runner.run", run)
    split = Interactions.load(folder).split("leave_one_out")
    rows, items = len(split.train), 30
    cli.Run(preset="paper", data=folder, out=tmp_path, lora=8, row_updates=5, seeds=1)()
    cli.Run(preset="paper", data=folder, out=tmp_path, backbone="my/model", fraction=0.5)()
    turns = [{"role": "user", "content": "2 + 2?"}, {"role": "assistant", "content": "4"}]
    (tmp_path / "said.jsonl").write_text(f"{json.dumps({'messages': turns})}\n" * 2048)
    cli.Run(preset="paper", data=folder, out=tmp_path, conversations=tmp_path / "said.jsonl")()
    talking = jobs.pop()
    assert talking.conversations == str(tmp_path / "said.jsonl")
    assert talking.recipe.preset == "paper-conversations"
    assert talking.recipe.stage1.validate_every == (5 * rows + 3 * items + 2048) // 1024
    with pytest.raises(InputError, match="--conversations is of --preset paper"):
        cli.Run(data=folder, out=tmp_path, conversations=tmp_path / "said.jsonl")()
    cli.Run(preset="paper", data=folder, out=tmp_path, backbone="my/model", fraction=0.001, rows=7)()
    trial = jobs.pop().recipe
    assert trial.preset == "paper-model-0.001-7rows"
    assert (trial.evaluation.test_rows, trial.evaluation.valid_rows, trial.stage1.validate_rows) == (7, 7, 7)
    assert {(stage.updates, stage.warmup) for stage in (trial.stage1, trial.stage2)} == {(1, 0)}  # at the full rate
    whole, half = (job.recipe for job in jobs)
    assert whole.backbone == Pretrained("Qwen/Qwen3-1.7B", row_updates=5, lora_rank=8)
    assert half.backbone == Pretrained("my/model")
    assert (whole.preset, half.preset) == ("paper-lora8-rows5", "paper-model-0.5")
    epoch = max(1, (5 * rows + 3 * items) // 1024)
    assert (whole.stage1.updates, whole.stage1.validate_every, whole.stage1.patience) == (10 * epoch, epoch, 3)
    assert (whole.stage2.updates, whole.stage2.validate_every, whole.stage2.patience) == (5, 1, 5)  # fewer rows
    assert (half.stage1.updates, half.stage1.validate_every) == (5 * epoch, max(1, round(epoch / 2)))
    assert whole.stage3.updates == max(1, 10 * rows // 256) == 2 * half.stage3.updates
    assert (whole.seeds, half.seeds) == ((0,), (0, 1, 2))
    office = recipes.paper(38_924, 38_924, 3_459, whole.backbone)
    assert (office.stage1.warmup, office.stage2.warmup) == (20, 10)
    # as the fork sets them, but for the warm-up of so few rows: a fourth of the updates at most
    assert {(stage.schedule, stage.weight_decay) for stage in (whole.stage1, whole.stage2)} == {("linear", 0.0)}
    assert (whole.stage1.batch_size, whole.stage1.learning_rate, whole.stage1.warmup) == (1024, 3e-4, 2)
    assert (whole.stage2.batch_size, whole.stage2.learning_rate, whole.stage2.warmup) == (1024, 1e-5, 1)
    assert (whole.stage3.prompts, whole.stage3.group_size, whole.stage3.learning_rates) == (256, 16, (5e-7,))
    assert (whole.stage3.beta, whole.stage3.num_iterations, whole.stage3.temperature) == (1e-3, 1, 1.0)


def test_a_damaged_file_is_named(folder, tmp_path):
    for name in ("items.tsv.gz", "sids.tsv.gz"):
        (tmp_path / name).write_bytes((folder / name).read_bytes())
    (tmp_path / "sequences.tsv.gz").write_bytes((folder / "sequences.tsv.gz").read_bytes()[:-20])
    answer = call("data", "describe", tmp_path)
    assert answer.returncode == 1
    assert "sequences.tsv.gz" in answer.stderr
    assert "not a whole gzip file" in answer.stderr
    assert "Traceback" not in answer.stderr


@pytest.mark.parametrize("room", [10_000, 20_000, 40_000])  # ends in the weights, and in the optimizer's state
def test_a_full_disk_is_one_message(room, tmp_path):
    """No file may grow past `room` bytes, which fails as a full disk does, inside torch and safetensors too."""
    script = f"""
import resource, sys
from sapo import cli
from sapo.experiments import recipes
from test_experiments import TINY
recipes.preset = lambda name, data: TINY
resource.setrlimit(resource.RLIMIT_FSIZE, ({room}, {room}))
sys.argv = ["sapo", "run", "--out", {str(tmp_path)!r}, "--workers", "1"]
cli.main()
"""
    answer = subprocess.run(
        [sys.executable, "-c", script],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        # modules that were not compiled before would be left cut short
        env=os.environ | {"PYTHONPATH": str(Path(__file__).parent), "PYTHONDONTWRITEBYTECODE": "1"},
    )
    assert answer.returncode == 1, answer.stderr
    assert "Finished runs are intact" in answer.stderr
    assert "Traceback" not in answer.stderr
    assert not list(tmp_path.rglob(".partial-*"))
    assert not (tmp_path / "results.csv").exists()


@pytest.mark.parametrize("after", [0.0, 1.0, 6.0])  # while the workers start, import, and train
def test_ctrl_c_says_how_to_go_on(tmp_path, after):
    process = subprocess.Popen(
        [sys.executable, "-m", "sapo.cli", "run", "--out", str(tmp_path), "--workers", "2"],
        stderr=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    parent, deadline = psutil.Process(process.pid), time.monotonic() + 90
    while len(parent.children()) < 3 and time.monotonic() < deadline:  # two workers and Python's resource tracker
        time.sleep(0.01)
    time.sleep(after)
    os.killpg(process.pid, signal.SIGINT)  # what a terminal sends to all processes of the job
    _, errors = process.communicate(timeout=600)
    assert process.returncode == 130
    assert "The same command goes on" in errors
    assert "Traceback" not in errors
    assert not (tmp_path / "results.csv").exists()


def test_claims_are_printed_and_recorded(tiny, tmp_path, monkeypatch, capsys):
    record = Path(cli.__file__).parent.parent.parent / "paper_figures" / "data"
    for name in ("rollouts.csv.gz", "dynamics.csv.gz"):
        (tmp_path / name).symlink_to(record / name)
    monkeypatch.setattr("sapo.lab.claims.CLAIMS", {1: claims.CLAIMS[1], 2: claims.CLAIMS[2]})
    tiny("claims", "--only", 1, "--record", tmp_path)
    shown = capsys.readouterr().out
    assert "With an outcome-only reward the step advantage is the trajectory advantage" in shown
    assert "0 [0, 0]: holds, exactly" in shown
    assert not (tmp_path / "claims.csv").exists()
    tiny("claims", "--record", tmp_path)
    assert set(pd.read_csv(tmp_path / "claims.csv")["command"]) == {f"sapo claims --only {number}" for number in (1, 2)}
    with pytest.raises(SystemExit, match="there is no claim 3; there are 1, 2"):
        tiny("claims", "--only", 3, "--record", tmp_path)


def test_lab_writes_its_table(tiny, tmp_path, monkeypatch):
    small = partial(sweep.Sweep, ("grpo", "sapo"), (0.1,), (0.0,), (2,), items=(64,))
    monkeypatch.setattr(sweep, "Sweep", small)
    tiny("lab", "--to", tmp_path, "--worlds", 2)
    written = pd.read_csv(tmp_path / "exact.csv")
    assert written["objective"].tolist() == ["grpo", "sapo"] * 2
    assert written["seed"].tolist() == [0, 0, 1, 1]


def test_from_raw_files_to_figures(tiny, tmp_path, capsys):
    """What `sapo data amazon ... && make reproduce DATA=...` does."""
    reviews, products = raw_files(tmp_path)
    shop = tmp_path / "home"
    raw = ["--reviews", reviews, "--products", products, "--out", shop]
    tiny("data", "amazon", "Home", *raw, "--method", "rkmeans", "--levels", 4, 4, 4)
    said = capsys.readouterr().out
    assert "1 broken lines" in said
    assert "360 interactions of 24 items by 40 users are left" in said
    for words in (
        "codes effectively used",
        "share of items with a SID of another item, as learnt",
        "variance of the vectors that codes leave",
    ):
        assert words in said
    tiny("data", "describe", shop)
    assert "target of the day of the item before" in capsys.readouterr().out
    out = tmp_path / "out"
    tiny("run", "--data", shop, "--out", out, "--seeds", 1, "--objectives", "sapo", "--ablations", "--workers", 1)
    results = pd.read_csv(out / "results.csv")
    assert set(results["split"]) == {"published_test"}
    assert "sapo" in set(results["method"])
    tiny("figures", "--out", out)
    assert (out / "index.html").is_file()


def test_raw_files_of_several_categories_go_on_after_a_stop(tiny, tmp_path, capsys, monkeypatch):
    """The second category is not to be had; when it is, the first is not fetched or made again, and neither is a folder
    that was stopped before its SIDs refused."""
    site = tmp_path / "site"
    reviews, products = raw_files(tmp_path)
    for part in ("categoryFilesSmall", "metaFiles2"):
        (site / part).mkdir(parents=True)

    def place(name):
        return [
            site / "categoryFilesSmall" / f"{name}_5.json.gz",
            site / "metaFiles2" / f"meta_{name}.json.gz",
        ]

    for source, target in zip((reviews, products), place("Home"), strict=True):
        shutil.copy(source, target)

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *arguments):
            pass

    running = http.server.ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=site))
    threading.Thread(target=running.serve_forever, daemon=True).start()
    monkeypatch.setitem(amazon.HOSTS, "2018", f"http://127.0.0.1:{running.server_address[1]}")
    monkeypatch.chdir(tmp_path)
    command = ("data", "amazon", "Home", "Garden", "--method", "rkmeans", "--levels", 8, 8)
    with pytest.raises(SystemExit, match=r"Garden_5\.json\.gz: 404"):
        tiny(*command)
    first = (tmp_path / "data" / "Home" / "sids.tsv.gz").read_bytes()
    for source, target in zip((reviews, products), place("Garden"), strict=True):
        shutil.copy(source, target)
    shutil.rmtree(tmp_path / "data" / "raw")
    for path in place("Home"):
        path.unlink()
    capsys.readouterr()
    tiny(*command)
    said = capsys.readouterr().out
    assert f"{Path('data/Home')} was made before, with the same settings" in said
    assert f"{Path('data/Home')} has its SIDs" in said
    assert (tmp_path / "data" / "Home" / "sids.tsv.gz").read_bytes() == first
    assert Catalog.load(tmp_path / "data" / "Garden").num_items == 24
    with pytest.raises(SystemExit, match=r"Home has SIDs of other settings \(rkmeans\)"):
        tiny(*command, "--seed", 1)
    (tmp_path / "data" / "Home" / "sids.tsv.gz").unlink()
    tiny(*command)
    assert (tmp_path / "data" / "Home" / "sids.tsv.gz").read_bytes() == first
    running.shutdown()
    running.server_close()


def test_tokenize_and_compare(tiny, folder, tmp_path, capsys):
    shop = tmp_path / "shop"
    shutil.copytree(folder, shop)
    tiny("data", "tokenize", shop, "--name", "sids_letter", "--method", "letter", "--levels", 8, 4, "--epochs", 2)
    assert Catalog.load(shop, "sids_letter").num_levels == 2
    assert (shop / "sids_letter.safetensors").is_file()
    assert "sids_letter.tsv.gz" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="no tokenizer of ours made"):
        tiny("data", "tokenize", shop)
    tiny("data", "compare", shop, "--to", tmp_path, "--seeds", 1, "--epochs", 1)
    rows = pd.read_csv(tmp_path / "tokenizers.csv")
    assert set(rows["dataset"]) == {"shop"}
    assert set(rows.loc[rows["source"] == "published", "tokenizer"]) == {"sids"}  # sids_letter is ours
    fitted = rows[rows["source"] == "measured"].pivot(index="tokenizer", columns="metric", values="value")
    assert set(fitted.index) == {"rkmeans", "rkmeans_balanced", "rqvae", "lcrec", "letter"}
    assert (fitted["collision_rate"] <= fitted["collisions_before"]).all()
    assert fitted["reconstruction_error"].between(0, 1.2).all()
    before = len(rows)
    tiny(
        "data", "compare", shop, "--to", tmp_path, "--seeds", 1, "--epochs", 1
    )  # rows of a folder are replaced, not added
    assert len(pd.read_csv(tmp_path / "tokenizers.csv")) == before


def test_a_teacher_explains_and_is_learnt_from(tiny, folder, tmp_path, capsys, monkeypatch):
    says = lambda self, prompt: f"{self.model} says so. " + prompt.split("next purchase is: ")[1].split()[0] + " it is."  # noqa: E731
    monkeypatch.setattr("sapo.training.rationales.OpenAITeacher.__call__", says)
    options = ["--url", "http://localhost:1/v1", "--model", "oracle", "--rows", 50, "--to", tmp_path / "r.jsonl"]
    tiny("data", "explain", folder, *options)
    said = capsys.readouterr().out
    assert "50 rationales in" in said
    assert "of its words are said" in said
    assert (tmp_path / "r.jsonl").read_text().count("oracle says so.") == 50
    out = ["--out", tmp_path / "out", "--seeds", 1, "--objectives", "sapo", "--ablations", "--workers", 1]
    tiny("run", "--data", folder, "--rationales", tmp_path / "r.jsonl", *out)
    assert "training rows have a rationale" in capsys.readouterr().out
    results = pd.read_csv(tmp_path / "out" / "results.csv")
    assert results["preset"].str.endswith("-rationales").all()
    policy = next((tmp_path / "out").glob("runs/*/seed0/stage2-*/policy"))
    assert "oracle" in (policy / "tokenizer.json").read_text()  # the policy knows the teacher's words
