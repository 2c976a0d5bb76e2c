"""The main job end to end on a tiny recipe: what it writes, what it skips, what it survives."""

import errno
import json
import os
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path
from threading import Thread

import numpy as np
import pandas as pd
import pytest
import torch

from sapo.analysis.results import add_results, read_results
from sapo.common.files import updating, write_csv
from sapo.credit.objectives import OBJECTIVES
from sapo.data.reasoning import ReasoningConfig
from sapo.data.synthetic import SyntheticConfig
from sapo.errors import InputError
from sapo.experiments import folders, run_folder, runner, stages, starts
from sapo.experiments.recipes import EvaluationConfig, Recipe, RLConfig, in_world
from sapo.experiments.run_folder import Job, load_world
from sapo.experiments.runner import publish, run
from sapo.experiments.systems import SYSTEMS
from sapo.policy.backbone import BackboneConfig
from sapo.policy.policy import Policy, recommend
from sapo.training.config import SAPOConfig
from sapo.training.sft import SFTConfig
from sapo.training.trainer import SAPOTrainer

TINY = Recipe(
    preset="quick",
    stage1=SFTConfig(updates=12, batch_size=16),
    stage2=SFTConfig(updates=8, batch_size=16),
    stage3=RLConfig(updates=4, prompts=2, group_size=4, learning_rates=(1e-3, 3e-3), log_every=2),
    backbone=BackboneConfig(hidden_size=16, num_heads=2, intermediate_size=16),
    world=SyntheticConfig(num_users=60, num_items=30, branching=(4, 4, 4)),
    evaluation=EvaluationConfig(test_rows=20, valid_rows=10, rollout_prompts=5),
    seeds=(0, 1),
    ablations=("sapo_outcome_reward",),
)


def snapshot(folder):
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A finished job, run in this process."""
    out = tmp_path_factory.mktemp("out")
    job = Job(TINY, str(out))
    return job, out, run(job, workers=1)


def test_every_method_and_seed_has_its_rows(finished):
    _job, out, _ = finished
    results = read_results(out / "results.csv")
    at_10 = results[results["metric"] == "ndcg@10"]
    seeds = at_10.groupby("method")["seed"].apply(lambda column: sorted(column.tolist())).to_dict()
    assert seeds == {
        "popularity": [0],
        "cooccurrence": [0],
        "item_knn": [0],
        "optimum": [0],
        "stage2": [0, 1],
        "stage2_no_thinking": [0, 1],
        "sapo": [0, 1],
        "grpo": [0, 1],
        "sapo_outcome_reward": [0],  # ablations get the first seed
    }
    assert set(results["dataset"]) == {"synthetic"}
    assert (at_10["n"] == 20).all()
    # no block is written by a policy that does not think; what the trie allows is less than all
    mass = results[results["metric"].str.startswith("allowed_mass/")].pivot_table("value", "method", "metric")
    assert list(mass.columns) == ["allowed_mass/block", *(f"allowed_mass/level_{k}" for k in (1, 2, 3))]
    assert mass.loc["stage2_no_thinking"].isna().tolist() == [True, False, False, False]
    assert ((mass > 0) & (mass < 1)).loc["sapo"].all()
    sources = results.groupby("method")["source"].first()
    assert sources["optimum"] == "exact"
    assert sources["sapo"] == "measured"
    seconds = results[results["metric"] == "seconds"].set_index(["method", "seed"])["value"]
    for seed in (0, 1):  # of all stages
        assert seconds["sapo", seed] > seconds["stage2", seed] > 0
    updates = results[results["metric"] == "updates"].set_index(["method", "seed"])["value"]
    assert updates[("sapo", 1)] == 4
    assert updates[("stage2", 0)] == 8
    # every number names a run whose folder says how it was made
    for name in set(results["run"]):
        manifest = json.loads(next(out.glob(f"runs/**/{name}/run.json")).read_text())
        assert manifest["status"] == "finished"
        assert {"identity", "config", "hardware", "versions", "commit", "started", "seconds", "code"} <= set(manifest)


def test_the_learning_rate_is_the_best_of_the_grid_on_validation(finished):
    job, _out, _ = finished
    for name in ("sapo", "grpo", "sapo_outcome_reward"):
        scores = {
            rate: folders.stage3_folder(job, 0, name, rate)
            .table("metrics.csv")
            .set_index("metric")["value"]["valid/ndcg@10"]
            for rate in (1e-3, 3e-3)
        }
        chosen = runner.choose_learning_rate(job, name)
        assert scores[chosen] == max(scores.values())
        # only the chosen one reads the test rows, and only it is trained with the other seeds
        for rate in scores:
            assert (folders.stage3_folder(job, 0, name, rate).path / "test.csv").is_file() == (rate == chosen)
        if name in TINY.objectives:
            assert [folders.stage3_folder(job, 1, name, rate).finished for rate in scores] == [
                r == chosen for r in scores
            ]


def test_curves_and_rollouts_come_out(finished):
    _, out, _ = finished
    curves = pd.read_csv(out / "dynamics.csv.gz")
    assert set(curves["method"]) == {"sapo", "grpo", "sapo_outcome_reward"}
    assert {"reward", "kl", "rewards/exact/mean", "step/1/length", "step/3/frac_zero_spread"} <= set(curves["metric"])
    assert set(curves[curves["metric"] == "reward"]["step"]) == {2, 4}
    rollouts = pd.read_csv(out / "rollouts.csv.gz")
    assert len(rollouts) == 2 * 5 * 4 * 3  # seeds x prompts x completions x levels
    assert set(rollouts["match"]) <= {0, 1}
    assert list((out / "runs").glob("*/seed0/sapo-lr*/completions/*.parquet"))
    assert not list((out / "runs").glob("**/checkpoint-*"))


def test_every_decoding_of_a_policy_is_recorded_and_follows_from_its_ranks(finished):
    """Both collision policies, both scores, both widths; the headline is NDCG of the ranks kept for every user."""
    job, _, results = finished
    rows = results[(results["method"] == "sapo") & (results["seed"] == 1)].set_index("metric")["value"]
    for prefix in ("", "item/", "full/", "beams50/"):
        for metric in ("recall@1", "recall@5", "recall@10", "ndcg@5", "ndcg@10"):
            assert 0 <= rows[prefix + metric] <= 1
    rate = runner.choose_learning_rate(job, "sapo")
    users = folders.stage3_folder(job, 1, "sapo", rate).table("per_user.csv.gz")
    assert len(users) == 20
    for prefix in ("", "full/", "beams50/"):
        rank = users[f"{prefix}rank"]
        assert rows[f"{prefix}recall@5"] == pytest.approx(((rank > 0) & (rank <= 5)).mean())
        gain = (1 / np.log2(rank.clip(lower=1) + 1)).where(rank > 0, 0.0)
        assert rows[f"{prefix}ndcg@10"] == pytest.approx(gain.mean())
    # by item: of the ranks first, first + 1, ... that are equally likely, the share among the first five
    first, sharers = users["item/rank"], users["item/sharers"]
    inside = (first + sharers - 1).clip(upper=5) - first + 1
    assert rows["item/recall@5"] == pytest.approx((inside.clip(lower=0) / sharers).where(first > 0, 0).mean())
    for level in (1, 2, 3):
        assert rows[f"match_level_{level}"] == pytest.approx(users[f"match_{level}"].mean())
    assert rows["valid_share"] == 1
    assert rows["duplicate_share"] == 0
    for part in ("seen_rows", "unseen_rows"):  # stage 3 draws its prompts from training rows
        assert 0 <= rows[f"exact_match/{part}"] <= 1


def test_a_card_lies_beside_every_checkpoint(finished):
    job, _, _ = finished
    rate = runner.choose_learning_rate(job, "sapo")
    for folder in (
        *(folders.supervised_folder(job, 0, stage) for stage in ("stage1", "stage2")),
        folders.stage3_folder(job, 0, "sapo", rate),
    ):
        card = (folder.policy / "README.md").read_text("utf-8")
        assert card.startswith(f"# {folder.row['method']}, seed 0")
        for word in ("synthetic", "leave_one_out", "quick", "Validation:", '"seed": 0', "must not be evaluated"):
            assert word in card, word
        ndcg = folder.table("metrics.csv").set_index("metric")["value"].get("valid/ndcg@10")
        assert (f"valid/ndcg@10 {ndcg:.4f}" if ndcg is not None else "not evaluated") in card


def test_stage_3_refuses_the_training_rows_of_another_split(finished, tmp_path):
    job, _, _ = finished
    other = replace(job, recipe=replace(TINY, world=replace(TINY.world, num_users=70)))
    args = SAPOConfig(str(tmp_path), num_generations=2, per_device_train_batch_size=4, max_steps=1)
    stage2 = folders.supervised_folder(job, 0, "stage2").policy
    with pytest.raises(InputError, match="Train one for this split"):
        SAPOTrainer.from_catalog(stage2, job.world.catalog, args, other.world.split)


def test_a_second_run_does_nothing(finished, monkeypatch):
    job, out, results = finished
    before = snapshot(out / "runs")
    for name in ("train_supervised_stage", "train_stage3", "run_references", "run_test"):
        monkeypatch.setattr(runner, name, lambda *arguments: pytest.fail("called again"))
    again = run(job, workers=1)
    assert snapshot(out / "runs") == before
    assert again.reset_index(drop=True).equals(results.reset_index(drop=True))


def test_other_settings_make_other_runs_and_leave_these_alone(finished):
    job, _, _ = finished
    other = replace(job, recipe=replace(TINY, stage3=replace(TINY.stage3, updates=5)))
    same = folders.supervised_folder(other, 0, "stage2")
    assert same.path == folders.supervised_folder(job, 0, "stage2").path  # stages 1 and 2 are shared
    assert folders.stage3_folder(other, 0, "sapo", 1e-3).path != folders.stage3_folder(job, 0, "sapo", 1e-3).path


def test_what_another_preset_has_trained_is_copied(finished, tmp_path, monkeypatch):
    """Stages 1 and 2 do not depend on stage 3: a preset that differs there alone trains none of them."""
    job, out, _ = finished
    shutil.copytree(out, tmp_path / "out")
    other = Job(replace(TINY, preset="other", stage3=replace(TINY.stage3, beta=0.5)), str(tmp_path / "out"))
    for name in ("stage1", "stage2", "stage2_no_thinking"):
        theirs, ours = (folders.supervised_folder(each, 0, name) for each in (job, other))
        with monkeypatch.context() as context:
            context.setattr(stages, "train_supervised", pytest.fail)
            stages.train_supervised_stage(other, 0, name)
        assert ours.manifest == theirs.manifest | {"preset": "other"}
        weights = [(folder.policy / "model.safetensors").read_bytes() for folder in (theirs, ours)]
        assert weights[0] == weights[1]
        metrics = [folder.table("metrics.csv") for folder in (theirs, ours)]
        assert set(metrics[1]["preset"]) == {"other"}
        assert "preset other. Code" in (ours.policy / "README.md").read_text("utf-8")
        pd.testing.assert_frame_equal(*(table.drop(columns="preset") for table in metrics))
    longer = replace(other.recipe, stage2=replace(TINY.stage2, updates=9))
    assert not folders.supervised_folder(replace(other, recipe=longer), 0, "stage2").take_over()


def test_a_stage_is_another_when_the_one_before_it_is(finished, monkeypatch):
    job, _, _ = finished
    child, stage1 = folders.supervised_folder(job, 0, "stage2"), stages.STAGES["stage1"]
    assert stages.STAGES["stage2"].parent == "stage1"
    monkeypatch.setitem(stages.STAGES, "stage1", replace(stage1, method="another"))
    assert folders.supervised_folder(job, 0, "stage2").path != child.path


def test_same_seed_same_numbers_also_when_interrupted(finished, tmp_path, monkeypatch):
    """Ctrl-C in the middle of stage 3, then the same command: the numbers of the undisturbed job, to the last digit."""
    job, _, results = finished
    again = replace(job, out=str(tmp_path))
    validate, calls = stages._validate, []

    def interrupted(*arguments, **options):
        calls.append(1)
        if len(calls) == 7:  # after training one of the policies of stage 3
            raise KeyboardInterrupt
        return validate(*arguments, **options)

    monkeypatch.setattr(stages, "_validate", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run(again, workers=1)
    assert not (tmp_path / "results.csv").exists()
    repeated = run(again, workers=1)
    key = ["method", "seed", "metric"]
    timeless = (table[table["metric"] != "seconds"] for table in (results, repeated))
    first, second = (table.sort_values(key)[[*key, "value"]].reset_index(drop=True) for table in timeless)
    pd.testing.assert_frame_equal(first, second, check_exact=True)


def test_a_full_disk_leaves_earlier_results_intact(finished, tmp_path, monkeypatch):
    job, first, _ = finished
    out = shutil.copytree(first, tmp_path / "out")
    before = (out / "results.csv").read_bytes()
    other = replace(job, recipe=replace(TINY, stage3=replace(TINY.stage3, updates=2, log_every=1)), out=str(out))

    def full(*arguments, **options):
        raise OSError(errno.ENOSPC, "No space left on device", "policy")

    monkeypatch.setattr(stages.Policy, "save", full)
    with pytest.raises(OSError, match="No space left"):
        run(other, workers=1)
    assert (out / "results.csv").read_bytes() == before
    assert not list(out.rglob(".partial-*"))


def test_worker_processes_give_the_numbers_of_one(finished, tmp_path):
    job, _, results = finished
    small = replace(job, out=str(tmp_path), recipe=replace(TINY, seeds=(0,), objectives=("sapo",), ablations=()))
    side_by_side = run(small, workers=2)
    wanted = results[(results["method"] == "sapo") & (results["seed"] == 0)].set_index("metric")["value"]
    got = side_by_side[side_by_side["method"] == "sapo"].set_index("metric")["value"]
    assert got.drop("seconds").sort_index().equals(wanted.drop("seconds").sort_index())


def test_a_rate_that_diverges_loses_and_its_run_is_not_tried_again(finished, tmp_path, monkeypatch):
    job, _, _ = finished
    small = replace(job, out=str(tmp_path), recipe=replace(TINY, seeds=(0,), objectives=("sapo",), ablations=()))
    from sapo.training.trainer import SAPOTrainer

    train = SAPOTrainer.train

    def fails(self, **options):
        if self.args.learning_rate == 3e-3:
            raise FloatingPointError("the loss is nan")
        return train(self, **options)

    monkeypatch.setattr(SAPOTrainer, "train", fails)
    run(small, workers=1)
    assert folders.stage3_folder(small, 0, "sapo", 3e-3).diverged
    assert runner.choose_learning_rate(small, "sapo") == 1e-3
    only = replace(TINY, stage3=replace(TINY.stage3, learning_rates=(3e-3,)))
    with pytest.raises(FloatingPointError, match=r"diverged at every learning rate of the grid \(0\.003\)"):
        run(replace(small, recipe=replace(small.recipe, stage3=only.stage3)), workers=1)


@pytest.mark.parametrize("when", ["in training", "at the last update"])
def test_a_later_seed_that_diverges_is_left_out(when, finished, tmp_path, monkeypatch):
    """Nothing is tested of it, the others are reported, and the next call does nothing again."""
    job, out, _ = finished
    shutil.copytree(out / "runs", tmp_path / "runs")
    again = replace(job, out=str(tmp_path))
    rate = runner.choose_learning_rate(again, "sapo")
    lost = folders.stage3_folder(again, 1, "sapo", rate)
    shutil.rmtree(lost.path)
    from sapo.training.trainer import SAPOTrainer

    train = SAPOTrainer.train

    def fails(self, **options):
        if when == "in training":
            raise FloatingPointError("the loss is nan")
        train(self, **options)
        with torch.no_grad():
            self.model.lm_head.weight.fill_(float("nan"))

    monkeypatch.setattr(SAPOTrainer, "train", fails)
    for _ in range(2):
        results = run(again, workers=1)
        assert lost.diverged
        assert not lost.policy.exists()
        assert set(results.loc[results["method"] == "sapo", "seed"]) == {0}
        assert set(results.loc[results["method"] == "grpo", "seed"]) == {0, 1}


def test_a_system_whose_fit_diverges_is_left_out(finished, tmp_path, monkeypatch):
    job, out, _ = finished
    shutil.copytree(out / "runs", tmp_path / "runs")
    again = replace(job, recipe=replace(job.recipe, systems=("Rec-R1", "LICD")), out=str(tmp_path))

    def diverges(*given):
        raise FloatingPointError("the loss is nan")

    monkeypatch.setattr(stages, "fit", diverges)
    results = run(again, workers=1)
    assert all(folders.system_folder(again, seed, "Rec-R1").diverged for seed in (0, 1))
    assert "Rec-R1" not in set(results["method"])
    assert set(results.loc[results["method"] == "LICD", "seed"]) == {0, 1}
    assert {"sapo", "grpo"} <= set(results["method"])


def test_a_checkpoint_that_was_cut_short_is_not_resumed(finished, tmp_path):
    job, _, _ = finished
    folder = folders.supervised_folder(replace(job, out=str(tmp_path)), 0, "stage1")
    for step, text in ((3, '{"global_step": 3}'), (6, '{"global_st')):
        path = folder.path / "checkpoints" / f"checkpoint-{step}"
        path.mkdir(parents=True)
        (path / "trainer_state.json").write_text(text)
    assert folder.start(12)
    assert [path.name for path in (folder.path / "checkpoints").iterdir()] == ["checkpoint-3"]


def test_what_a_killed_run_left_half_written_goes(finished, tmp_path):
    job, _, _ = finished
    folder = folders.supervised_folder(replace(job, out=str(tmp_path)), 0, "stage1")
    process = subprocess.Popen(["true"])
    process.wait()
    gone, here = f".partial-{process.pid}-x", f".partial-{os.getpid()}-x"  # somebody else may still write the latter
    for half in (folder.path / gone, folder.path / "checkpoints"):
        half.mkdir(parents=True)
        (half / gone).write_bytes(b"half")
    (folder.path / here).write_bytes(b"half")
    (tmp_path / gone).write_bytes(b"half")
    folder.start(12)
    assert sorted(path.name for path in folder.path.rglob("*")) == [here, "checkpoints", "run.json"]
    with updating(tmp_path):
        assert not (tmp_path / gone).exists()


def test_a_catalogue_smaller_than_a_ranking(tmp_path):
    world = replace(TINY.world, branching=(3, 2), num_items=6, predictability=(0.8, 0.7))
    recipe = replace(TINY, world=world, seeds=(0,), objectives=(), ablations=())
    results = run(Job(recipe, str(tmp_path)), workers=1)
    at_10 = results[results["metric"] == "recall@10"].set_index("method")["value"]
    assert at_10["popularity"] == at_10["cooccurrence"] == 1  # all 6 items are among 10 places


def test_runs_do_not_need_git(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert run_folder._commit(tmp_path) is None


def test_results_of_a_method_are_replaced_as_a_whole(finished, tmp_path):
    """Seed 1 of an earlier configuration must not join a mean with seed 0 of this one."""
    _, out, results = finished
    runner.publish(out, tmp_path)
    fewer = results[(results["method"] == "sapo") & (results["seed"] == 0)].assign(value=0.5)
    add_results(fewer, tmp_path / "results.csv")
    merged = read_results(tmp_path / "results.csv")
    assert set(merged[merged["method"] == "sapo"]["seed"]) == {0}
    assert set(merged[merged["method"] == "grpo"]["seed"]) == {0, 1}


def test_stages_1_and_2_alone_are_a_job_too(finished, tmp_path):
    job, out, _ = finished
    shutil.copytree(out / "runs", tmp_path / "runs")
    stages = replace(job.recipe, objectives=(), ablations=())
    results = run(Job(stages, str(tmp_path)), workers=1)
    references = {"popularity", "cooccurrence", "item_knn", "optimum"}
    assert set(results["method"]) == references | {"stage2", "stage2_no_thinking"}
    assert list(pd.read_csv(tmp_path / "dynamics.csv.gz")) == list(pd.read_csv(out / "dynamics.csv.gz"))
    assert not len(pd.read_csv(tmp_path / "dynamics.csv.gz"))
    run(Job(job.recipe, str(tmp_path)), workers=1)  # RL joins them later
    assert (tmp_path / "dynamics.csv.gz").read_bytes() == (out / "dynamics.csv.gz").read_bytes()


def test_systems_of_the_field_are_runs_like_ours(finished, tmp_path, monkeypatch):
    """What each starts from, how it thinks, and that all have their rows; stages that ours share are not run again."""
    job, out, _ = finished
    shutil.copytree(out / "runs", tmp_path / "runs")
    before = snapshot(tmp_path / "runs")
    recipe = replace(job.recipe, objectives=("sapo",), ablations=(), systems=tuple(SYSTEMS))
    job = Job(recipe, str(tmp_path))
    results = run(job, workers=1)
    assert set(SYSTEMS) | {"sapo", "stage2"} <= set(results["method"])
    at_10 = results[results["metric"] == "ndcg@10"]
    for name in SYSTEMS:
        assert sorted(at_10[at_10["method"] == name]["seed"]) == [0, 1]
    assert before.items() <= snapshot(tmp_path / "runs").items()
    costs = results.set_index(["metric", "method", "seed"])["value"]
    without = costs["parameters", "RecCoT", 0] - costs["parameters", "RecCoT blind", 0]
    assert without > costs["parameters", "stage2", 0]  # who reads no thought needs no policy, nor the time it took
    alone = folders.system_folder(job, 0, "RecCoT blind").manifest["seconds"]
    assert costs["seconds", "RecCoT blind", 0] == pytest.approx(alone, abs=0.051)  # written to a tenth
    assert costs["seconds", "RecCoT", 0] > costs["seconds", "stage2", 0]

    catalog = load_world(job).catalog
    policies = {}
    for name in ("MiniOneRec", "SIDReasoner", "OneRec-Think"):
        rate = runner.choose_learning_rate(job, name)
        policies[name] = Policy.load(folders.stage3_folder(job, 0, name, rate).policy, catalog)
    policies["LC-Rec"] = Policy.load(folders.supervised_folder(job, 0, "stage2_alignment").policy, catalog)
    assert {name: policy.layout.blocks for name, policy in policies.items()} == {
        "MiniOneRec": 0,
        "SIDReasoner": 1,
        "OneRec-Think": 3,
        "LC-Rec": 0,
    }
    assert policies["SIDReasoner"].block_budget == 3 * recipe.block_budget  # as many words as in three blocks
    histories = load_world(job).split.test.history[:3]
    assert recommend(policies["MiniOneRec"], histories).thinking == [""] * 3
    assert all(
        thought.split().count("<think>") == 1 for thought in recommend(policies["SIDReasoner"], histories).thinking
    )
    with pytest.raises(InputError, match="has not learnt to think"):
        recommend(policies["MiniOneRec"], histories, thinking=True)
    licd = folders.system_folder(job, 0, "LICD")
    tried = licd.table("tried.csv").set_index("contrast")["ndcg@10"]
    assert tuple(tried.index) == SYSTEMS["LICD"].contrast
    assert tried[Policy.load(licd.policy, catalog).contrast] == tried.max()
    valid = licd.table("metrics.csv").set_index("metric")["value"]["valid/ndcg@10"]
    assert valid == pytest.approx(tried.max())
    # step credit has no meaning for one block before the SID, and a policy that does not think has no thoughts to train
    for name, objective, message in (
        ("SIDReasoner", "sapo", "1 thinking blocks for 3 SID tokens"),
        ("MiniOneRec", "best_of_beam", "does not think"),
    ):
        rate = runner.choose_learning_rate(job, name)
        folder = folders.stage3_folder(job, 0, name, rate).policy
        args = SAPOConfig(str(tmp_path), objective=objective, per_device_train_batch_size=8, num_generations=4)
        with pytest.raises(InputError, match=message):
            SAPOTrainer.from_catalog(folder, catalog, args, load_world(job).split)
    with monkeypatch.context() as patch:
        patch.setenv("ACCELERATE_USE_FSDP", "true")
        with pytest.raises(InputError, match="the values of rlvr need the whole model on each GPU: launch with DDP"):
            run(Job(replace(recipe, objectives=("sapo", "rlvr")), str(tmp_path)))
    with pytest.raises(InputError, match=r"unknown systems \['Rec'\]; known are LC-Rec"):
        run(Job(replace(recipe, systems=("Rec",)), str(tmp_path)))


def test_publish_adds_to_the_record(finished, tmp_path):
    _, out, _ = finished
    publish(out, tmp_path)
    first = (tmp_path / "results.csv").read_bytes()
    publish(out, tmp_path)  # the same rows replace themselves
    assert (tmp_path / "results.csv").read_bytes() == first
    recorded, whole = (set(read_results(folder / "results.csv")["metric"]) for folder in (tmp_path, out))
    shorter = [f"{way}/{name}@{k}" for way in ("beams50", "full") for name in ("recall", "ndcg") for k in (1, 5)]
    validated = {name for name in whole if name.startswith("valid/")} - {"valid/ndcg@10"}
    alike = {f"{hit}ndcg@1" for hit in ("", "item/", "sid/", "new/")}  # of one place it is the recall
    constant = {"valid_share", "duplicate_share"}
    assert whole - recorded == validated | (whole & {*shorter, *alike}) | constant
    assert {"valid/ndcg@10", "full/ndcg@10", "item/recall@1", "item/ndcg@5", "sid/ndcg@10", "recall@1"} <= recorded
    assert {"full/ndcg@5", "beams50/recall@1"} <= whole
    assert "valid/recall@10" in whole
    assert len(pd.read_csv(tmp_path / "rollouts.csv.gz")) == len(pd.read_csv(out / "rollouts.csv.gz"))
    runs = pd.read_csv(tmp_path / "runs.csv")  # where each number's run is told of, and no other run
    assert {Path(run).name for run in runs["run"]} == set(read_results(out / "results.csv")["run"])
    assert runs[["started", "hardware", "identity"]].notna().all(axis=None)
    with pytest.raises(InputError, match=r"holds no results\.csv"):
        publish(tmp_path / "nothing", tmp_path)


def test_who_publishes_waits_for_who_does(finished, tmp_path):
    """Both read the record and write it with rows added: one at a time, or rows are lost."""
    _, out, _ = finished
    with updating(tmp_path):
        other = Thread(target=publish, args=(out, tmp_path))
        other.start()
        other.join(0.5)
        assert other.is_alive()
        assert not (tmp_path / "results.csv").exists()
    other.join()
    assert (tmp_path / "results.csv").exists()


def test_bad_settings_say_so(tmp_path):
    with pytest.raises(InputError, match=r"unknown objectives \['nonsense'\]"):
        run(Job(replace(TINY, objectives=("nonsense",)), str(tmp_path)), workers=1)
    with pytest.raises(InputError, match="ablation_seeds is 3; there are 2"):
        run(Job(replace(TINY, ablation_seeds=3), str(tmp_path)), workers=1)
    with pytest.raises(InputError, match="no published test pairs"):
        load_world(Job(TINY, str(tmp_path), split="published_test"))
    assert not list(tmp_path.iterdir())
    assert set(TINY.objectives) < set(OBJECTIVES)


def test_real_data_takes_the_published_pairs_where_there_are_some(shared_data):
    office = load_world(Job(TINY, "", str(shared_data / "office")))
    assert (office.name, office.split.name, len(office.split.test)) == ("office", "published_test", 4866)
    other = load_world(Job(TINY, "", str(shared_data / "office"), sids="sids_mimigenrec", split="leave_one_out"))
    assert (other.name, other.split.name) == ("office-mimigenrec", "leave_one_out")


@pytest.mark.parametrize("name", ["table.csv", "table.csv.gz"])
def test_same_table_same_bytes(name, tmp_path):
    table = pd.DataFrame({"a": [1, 2], "b": ["x", "y"]})
    paths = tmp_path / "one" / name, tmp_path / "other" / name
    for path in paths:
        write_csv(table, path)
    assert paths[0].read_bytes() == paths[1].read_bytes()
    assert pd.read_csv(paths[0]).equals(table)


# ------------------------------------------------------------------------------------------------- looks and grids

REASONING = in_world(
    replace(
        TINY,
        stage2=SFTConfig(updates=40, batch_size=16, until_exact=0.2, look_every=2),
        stage3=replace(TINY.stage3, learning_rates=(1e-3, 1e-2), look_every=2, look_rows=20, give_up_below=0.5),
        objectives=("sapo", "grpo"),
        ablations=("grpo_step_reward",),
        seeds=(0, 1, 2),
        grid_seeds=2,
        evaluation=EvaluationConfig(test_rows=20, valid_rows=40, rollout_prompts=5),
    ),
    ReasoningConfig(levels=2, codes=3, num_users=60),
)


@pytest.fixture(scope="module")
def reasoned(tmp_path_factory):
    """A finished job in a reasoning world, and what it told of its tasks."""
    out, told = tmp_path_factory.mktemp("reasoned"), []
    job = Job(REASONING, str(out))
    return job, out, run(job, 1, lambda done, of: told.append((done, of))), told


def test_every_seed_of_the_grid_tries_every_rate_and_validation_chooses_by_their_mean(reasoned):
    job, out, results, told = reasoned
    looks = pd.read_csv(out / "looks.csv.gz")
    tried = looks.groupby(["method", "seed"])["learning_rate"].nunique()
    assert tried.to_dict() == {
        **{(method, seed): 2 for method in ("sapo", "grpo") for seed in (0, 1)},
        **{(method, 2): 1 for method in ("sapo", "grpo")},
        ("grpo_step_reward", 0): 2,  # an ablation of one seed
    }
    for method in ("sapo", "grpo"):
        means = {
            rate: np.mean(
                [
                    folders.stage3_folder(job, seed, method, rate)
                    .table("metrics.csv")
                    .set_index("metric")["value"]["valid/ndcg@10"]
                    for seed in (0, 1)
                ]
            )
            for rate in (1e-3, 1e-2)
        }
        chosen = runner.choose_learning_rate(job, method)
        assert means[chosen] == max(means.values())
        rates = results[(results["metric"] == "learning_rate") & (results["method"] == method)]
        assert rates["value"].tolist() == [chosen] * 3
    # references, three stages for each of three seeds, ten runs of the grid; then two runs and 13 tests: of two
    # supervised stages and two objectives three seeds each, and the ablation's one
    assert told == [(done, 20) for done in range(1, 21)] + [(done, 15) for done in range(1, 16)]


def test_looks_start_before_the_first_update_and_agree_for_all_runs_of_a_seed(reasoned):
    _, out, _, _ = reasoned
    looks = pd.read_csv(out / "looks.csv.gz")
    assert set(looks["metric"]) >= {"valid/ndcg@10", "valid/match_level_2", "kl", "grad_norm", "rollouts"}
    first = looks[(looks["metric"] == "valid/ndcg@10") & (looks["step"] == 0)]
    assert len(first) == 12
    assert (first.groupby("seed")["value"].nunique() == 1).all()


def test_stage_2_ends_at_what_it_can_do_and_says_so_of_its_rollouts(reasoned):
    job, _, results, _ = reasoned
    rows = results[results["method"] == "stage2"].set_index(["metric", "seed"])["value"]
    for seed in job.recipe.seeds:
        log = folders.supervised_folder(job, seed, "stage2").table("log.csv")
        seen = log[log["metric"] == "valid/recall@1"].set_index("step")["value"]
        updates = rows["updates", seed]
        assert updates == 40 or seen[updates] >= 0.2
        assert (seen[seen.index < updates] < 0.2).iloc[1:].all()  # the look before the first update ends nothing
    kept = pd.read_csv(Path(job.out) / "rollouts.csv.gz")
    for seed, of_seed in kept.groupby("seed"):
        match = of_seed.pivot(index=["prompt", "rollout"], columns="level", values="match")
        assert rows["rollouts/exact", seed] == pytest.approx((match[1] * match[2]).mean())
        assert rows["rollouts/match_level_2", seed] == pytest.approx(match[2].mean())
    # the control without thinking has no such end
    control = results[(results["method"] == "stage2_no_thinking") & (results["metric"] == "updates")]
    assert (control["value"] == 40).all()


def test_thoughts_are_those_of_the_world(reasoned):
    job, _, _, _ = reasoned
    words, traces = starts.words_and_traces(job)
    made = load_world(job).synthetic
    assert set(words) == {word for level in made.words for word in level}
    history = load_world(job).split.test.history[0]
    assert traces.of_row(history, 0) == made.traces.of_row(history, 0)


def test_the_record_keeps_looks_and_rounds_curves(reasoned, tmp_path):
    _, out, _, _ = reasoned
    publish(out, tmp_path)
    kept, whole = (pd.read_csv(folder / "looks.csv.gz") for folder in (tmp_path, out))
    assert len(kept) == len(whole)
    assert np.allclose(kept["value"], whole["value"], rtol=1e-4)
    assert (kept["value"].map(lambda value: float(f"{value:.5g}")) == kept["value"]).all()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"grid_seeds": 4}, "grid_seeds is 4; there are 3 seeds"),
        ({"ablation_seeds": 0}, "ablation_seeds is 0"),
    ],
)
def test_grids_that_do_not_fit_the_seeds_are_refused(tmp_path, change, message):
    with pytest.raises(InputError, match=message):
        run(Job(replace(REASONING, **change), str(tmp_path)), workers=1)


def test_a_rate_that_is_known_is_not_searched_for(tmp_path, reasoned):
    job, out, _, _ = reasoned
    shutil.copytree(out / "runs", tmp_path / "runs")
    known = replace(job.recipe, known_rates=(("grpo", 1e-3),), ablations=())
    assert (known.rates("grpo"), known.rates("sapo")) == ((1e-3,), (1e-3, 1e-2))
    results = run(Job(known, str(tmp_path)), workers=1)
    rates = results[results["metric"] == "learning_rate"].set_index(["method", "seed"])["value"]
    assert (rates["grpo"] == 1e-3).all()
    looks = pd.read_csv(tmp_path / "looks.csv.gz")
    assert set(looks.loc[looks["method"] == "grpo", "learning_rate"]) == {1e-3}
    assert set(looks.loc[looks["method"] == "sapo", "learning_rate"]) == {1e-3, 1e-2}


def test_a_rule_without_looks_is_refused():
    with pytest.raises(InputError, match="look_every says nothing of when to look"):
        RLConfig(give_up_below=0.5)
    with pytest.raises(InputError, match="look_every is 0"):
        RLConfig(look_every=0)
    with pytest.raises(InputError, match=r"until_exact is 1\.5; a share"):
        SFTConfig(updates=3, until_exact=1.5)
