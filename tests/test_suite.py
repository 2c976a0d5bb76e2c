"""Other recommenders on a data set: chosen on validation, tested once, in the table with everything else."""

import json
import shutil
from dataclasses import replace

import pandas as pd
import pytest
import torch
from threadpoolctl import threadpool_info

from sapo.analysis.ranks import Ranks
from sapo.analysis.results import read_results
from sapo.baselines import fitting
from sapo.baselines.cooccurrence import CoOccurrence
from sapo.baselines.fitting import FitConfig
from sapo.baselines.fusion import Fusion
from sapo.data.catalog import Catalog
from sapo.data.synthetic import SyntheticCatalogue, SyntheticConfig
from sapo.errors import InputError
from sapo.evaluation.evaluate import ranking_metrics
from sapo.experiments import suite
from sapo.semantic_ids.collisions import collision_rate, extra_token
from sapo.semantic_ids.config import TokenizerConfig
from sapo.semantic_ids.tokenizer import ItemTokenizer
from sapo.semantic_ids.vectors import item_texts

FIT = FitConfig(epochs=2, learning_rate=0.01)
GRID = ({"learning_rate": 1e-6}, {"size": 16}, {"epochs": 1})
FEW = {
    "GRU4Rec": suite.Baseline("gru4rec", {"size": 8, "hidden": 8}, FIT, GRID),
    "SASRec softmax": suite.Baseline("sasrec", {"size": 8}, FIT),
}


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """Folder of data, OUT, and the rows that came back."""
    folder, out = tmp_path_factory.mktemp("shop"), tmp_path_factory.mktemp("out")
    world = SyntheticCatalogue(SyntheticConfig((4, 4), num_items=16, predictability=(0.9, 0.9), num_users=150))
    world.catalog.save(folder)
    world.interactions.save(folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(suite, "BASELINES", FEW)
        patch.setattr(suite, "FUSIONS", {})
        results = suite.run_baselines(str(out), str(folder), seeds=2, workers=1)
    return folder, out, results


def test_every_method_and_seed_has_its_rows(finished):
    folder, out, results = finished
    at_10 = results[results["metric"] == "ndcg@10"]
    assert at_10.groupby("method")["seed"].apply(list).to_dict() == {
        "GRU4Rec": [0, 1],
        "SASRec softmax": [0, 1],
        "cooccurrence": [0],
        "item_knn": [0],
        "popularity": [0],
    }
    assert set(at_10["preset"]) == {"baseline"}
    assert set(at_10["dataset"]) == {folder.name}
    stored = read_results(out / "results.csv")
    assert len(stored) == len(results)
    weights = stored[(stored["method"] == "GRU4Rec") & (stored["metric"] == "parameters") & (stored["seed"] == 0)]
    # embeddings 17 x 16, three gates of 8 x (16 + 8), a dense layer of 8 x 16 with 16 biases
    assert weights["value"].tolist() == [17 * 16 + 24 * 24 + 8 * 16 + 16]


def test_validation_chooses_on_the_first_seed(finished):
    _, out, results = finished
    scores = {}
    for path in out.glob("runs/*/seed0/GRU4Rec-*/metrics.csv"):
        table = pd.read_csv(path).set_index("metric")["value"]
        scores[path.parent.name] = table["valid/ndcg@10"]
    assert len(scores) == 3
    chosen = set(results[results["method"] == "GRU4Rec"]["run"])
    assert max(scores, key=lambda run: scores[run]) in chosen
    assert "GRU4Rec-1" in max(scores, key=lambda run: scores[run])  # neither the rate of 1e-6 nor the single epoch
    assert {path.parent.name for path in out.glob("runs/*/seed*/*/test.csv")} == {
        run for run in results["run"] if not run.startswith("references")
    }  # others were never tested
    assert len(list(out.glob("runs/*/seed1/GRU4Rec-*"))) == 1


def test_metrics_follow_from_the_ranks_of_all_test_rows(finished):
    _, out, results = finished
    (path,) = out.glob("runs/*/seed1/SASRec_softmax-0-*")
    users = pd.read_csv(path / "per_user.csv.gz")
    assert len(users) == 150
    ranked = torch.full((150, 10), -1)
    for row, rank in enumerate(users["rank"]):
        if rank:
            ranked[row, rank - 1] = users["target"][row]
    of_run = results[(results["run"] == path.name)].set_index("metric")
    for metric, value in ranking_metrics(ranked, torch.tensor(users["target"].to_numpy()), (5, 10)).items():
        assert of_run.loc[metric, "value"] == pytest.approx(value)
        # in this world every item has a SID of its own, so that both ways to count agree
        assert of_run.loc[f"sid/{metric}", "value"] == pytest.approx(value)
    assert (users["sid/rank"] == users["rank"]).all()
    method = tuple(of_run.iloc[0][["dataset", "split", "preset", "method"]])
    for name in ("ndcg@10", "item/ndcg@10", "sid/ndcg@10"):
        assert Ranks(out).by_seed(method, name).loc[1].mean() == pytest.approx(of_run.loc["ndcg@10", "value"])
        assert of_run.loc[metric, "n"] == 150


def test_finished_runs_are_skipped_and_others_are_made_again(finished, monkeypatch):
    folder, out, results = finished
    monkeypatch.setattr(suite, "BASELINES", FEW)
    monkeypatch.setattr(suite, "FUSIONS", {})
    monkeypatch.setattr(suite, "fit", None)  # whoever fits now fails
    again = suite.run_baselines(str(out), str(folder), seeds=2, workers=1)
    assert again["value"].tolist() == results["value"].tolist()
    with pytest.raises(TypeError):
        suite.run_baselines(str(out), str(folder), ["SASRec softmax"], seeds=3, workers=1)


def test_models_of_codes_may_have_sids_of_their_own(finished, tmp_path, monkeypatch):
    """LETTER's, made once a seed, for all settings, of the texts and the training sequences."""
    folder, _, _ = finished
    tokenizer = TokenizerConfig("letter", levels=(4, 4), epochs=3, collisions="share_out")
    small = {"size": 8, "layers": 1, "heads": 1, "head_size": 8, "feed_forward": 8, "beams": 10}
    letter = suite.Baseline("tiger", small, FIT, ({}, {"temperature": 0.7}), tokenizer)
    monkeypatch.setattr(suite, "BASELINES", {"LETTER-TIGER": letter})
    monkeypatch.setattr(suite, "FUSIONS", {})
    results = suite.run_baselines(str(tmp_path), str(folder), seeds=2, workers=1)
    assert sorted(results[(results["method"] == "LETTER-TIGER") & (results["metric"] == "ndcg@10")]["seed"]) == [0, 1]
    assert len(list(tmp_path.glob("runs/*/seed*/sids_letter-*"))) == 2
    job = suite.Job(suite.replace(suite.QUICK, preset="baseline"), str(tmp_path), str(folder))
    catalog, split = job.world.catalog, job.world.split
    learnt = []
    for seed in (0, 1):
        expected = ItemTokenizer(replace(tokenizer, seed=seed)).fit(item_texts(catalog.texts), split)
        codes = extra_token(expected) if collision_rate(expected) else expected
        sizes = codes.amax(0) + 1
        starts = 1 + sizes.cumsum(0) - sizes  # 0 pads, then the codes of each level
        assert suite.build(job, "LETTER-TIGER", 0, seed).tokens.tolist() == (codes + starts).tolist()
        learnt.append(expected)
    assert not torch.equal(*learnt)


def test_a_seed_is_that_of_the_weights_too(finished, monkeypatch):
    folder, out, _ = finished
    monkeypatch.setattr(suite, "BASELINES", FEW)
    job = suite.Job(suite.replace(suite.QUICK, preset="baseline"), str(out), str(folder))
    for name in FEW:
        first, again, other = (suite.build(job, name, 0, seed).state_dict() for seed in (0, 0, 1))
        assert all(torch.equal(first[key], again[key]) for key in first)
        assert not torch.equal(first["items.weight"], other["items.weight"])


def test_a_fit_is_worth_its_best_validation(finished, monkeypatch, tmp_path):
    """That whose weights are kept, not the last."""
    folder, _, _ = finished
    rows = [{"epoch": at, "updates": 3 * at, "seconds": 10.0 * at, "loss": 1.0, "ndcg@10": at % 2} for at in (1, 2)]
    monkeypatch.setattr(suite, "BASELINES", FEW)
    monkeypatch.setattr(suite, "fit", lambda *_: rows)
    job = suite.Job(suite.replace(suite.QUICK, preset="baseline"), str(tmp_path), str(folder))
    suite.fit_baseline(job, "GRU4Rec", 0, 0)
    table = suite.baseline_folder(job, "GRU4Rec", 0, 0).table("metrics.csv").set_index("metric")["value"]
    assert table[["valid/ndcg@10", "updates", "seconds"]].tolist() == [1, 3, 20]  # both epochs had to be waited for


def test_a_fusion_is_made_of_what_was_fitted_and_counted(finished, monkeypatch, tmp_path):
    """Of each seed its own; weights and costs stand in the record, and the test rows are those of all."""
    folder, out, _ = finished
    shutil.copytree(out / "runs", tmp_path / "runs")
    monkeypatch.setattr(suite, "BASELINES", FEW)
    monkeypatch.setattr(suite, "FITTED", tuple(FEW))
    monkeypatch.setattr(suite, "FUSIONS", {"Fusion": ("cooccurrence", *FEW), "Fusion of fitted": tuple(FEW)})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(suite, "fit", None)  # the parts are there
        results = suite.run_baselines(str(tmp_path), str(folder), ["Fusion", "Fusion of fitted"], seeds=2, workers=1)
    rows = results[results["method"] == "Fusion"].pivot(index="metric", columns="seed", values="value")
    assert rows.columns.tolist() == [0, 1]
    costs = results[results["method"].isin(FEW)].set_index(["metric", "method", "seed"])["value"]
    for seed in (0, 1):
        used = [name for name in FEW if rows.loc[f"weight/{name}", seed]]
        assert rows.loc["parameters", seed] == sum(costs["parameters", name, seed] for name in used)
        # all of its parts had to be fitted, also those that it gave no weight
        (run,) = tmp_path.glob(f"runs/*/seed{seed}/Fusion-*/run.json")
        own = rows.loc["seconds", seed] - sum(costs["seconds", name, seed] for name in FEW)
        assert own > 0
        assert own == pytest.approx(json.loads(run.read_text())["seconds"], abs=0.051)  # written to a tenth
        assert rows.loc["offset", seed] in (1, 5, 20)
    # the weights are those that validation rows choose, and nothing was asked of the test rows
    job = suite.Job(suite.replace(suite.QUICK, preset="baseline"), str(tmp_path), str(folder))
    valid, chosen = job.world.split.valid, {name: suite.choose(job, name) for name in FEW}
    lists = {"cooccurrence": CoOccurrence().fit(job.world.split.sequences, 16).rank(valid.history, 16)}
    for name, number in chosen.items():
        model = suite.build(job, name, number, 1)
        suite.load_model(model, str(suite.baseline_folder(job, name, number, 1).path / "model.safetensors"))
        lists[name] = model.rank(valid.history, 16, valid.user)
    expected = Fusion(16).fit(lists, torch.tensor(valid.target))
    assert {name: rows.loc[f"weight/{name}", 1] for name in expected.weights} == expected.weights
    assert rows.loc["offset", 1] == expected.offset
    worth = ranking_metrics(expected.rank(lists, 10), torch.tensor(valid.target), (10,))["ndcg@10"]
    assert rows.loc["valid/ndcg@10", 1] == pytest.approx(worth)
    (path,) = tmp_path.glob("runs/*/seed1/Fusion-*")
    users = pd.read_csv(path / "per_user.csv.gz")
    assert len(users) == 150
    assert (users["rank"] > 0).mean() == pytest.approx(rows.loc["recall@10", 1])
    with pytest.raises(InputError, match="no baselines"):
        suite.run_baselines(str(tmp_path), str(folder), ["Fusions"])


def test_what_decides_a_fusion_is_in_its_identity(finished, tmp_path, monkeypatch):
    folder, _, _ = finished
    monkeypatch.setattr(suite, "BASELINES", FEW)
    monkeypatch.setattr(suite, "FUSIONS", {"Fusion": ("cooccurrence", *FEW)})
    job = suite.Job(suite.replace(suite.QUICK, preset="baseline"), str(tmp_path), str(folder))
    chosen = dict.fromkeys(FEW, 0)
    identity = lambda: suite.fusion_folder(job, "Fusion", 0, chosen).identity  # noqa: E731
    seen = [identity()]
    for name, value in (("FUSED", 50), ("VALID", 100), ("FUSIONS", {"Fusion": ("item_knn", *FEW)})):
        monkeypatch.setattr(suite, name, value)
        seen.append(identity())
    chosen["GRU4Rec"] = 1
    assert len({*seen, identity()}) == 5


def test_a_setting_that_diverges_loses_and_does_not_end_the_others(finished, tmp_path, monkeypatch):
    folder, _, _ = finished
    bad = suite.Baseline("gru4rec", {"size": 8, "hidden": 8}, FIT, ({"learning_rate": 1e30}, {"epochs": 1}))
    monkeypatch.setattr(suite, "BASELINES", {"GRU4Rec": bad})
    results = suite.run_baselines(str(tmp_path), str(folder), ["GRU4Rec"], seeds=1, workers=1)
    assert results[results["method"] == "GRU4Rec"]["run"].str.startswith("GRU4Rec-1").all()
    monkeypatch.setattr(suite, "BASELINES", {"GRU4Rec": suite.replace(bad, grid=bad.grid[:1])})
    with pytest.raises(FloatingPointError, match="GRU4Rec diverged with every setting"):
        suite.run_baselines(str(tmp_path), str(folder), ["GRU4Rec"], seeds=1, workers=1)


def test_a_later_seed_that_diverges_has_no_rows_and_no_fusion(finished, tmp_path, monkeypatch):
    """And all else comes out, at the first call and at the next, which fits nothing."""
    folder, _, _ = finished
    fusions = {"Fusion": tuple(FEW), "Fusion of one": ("cooccurrence", "GRU4Rec")}
    monkeypatch.setattr(suite, "BASELINES", FEW)
    monkeypatch.setattr(suite, "FUSIONS", fusions)
    fit = suite.fit

    def breaks(model, split, config, seed, title, checkpoint):
        if seed == 1 and title.startswith("SASRec"):
            raise FloatingPointError("the loss is nan")
        return fit(model, split, config, seed, title, checkpoint)

    monkeypatch.setattr(suite, "fit", breaks)
    for _ in range(2):
        results = suite.run_baselines(str(tmp_path), str(folder), [*FEW, *fusions], seeds=2, workers=1)
        seeds = results[results["metric"] == "recall@10"].groupby("method")["seed"].apply(list)
        assert (seeds["GRU4Rec"], seeds["SASRec softmax"], seeds["Fusion"]) == ([0, 1], [0], [0])
        assert seeds["Fusion of one"] == [0, 1]
        monkeypatch.setattr(suite, "fit", None)  # whoever fits now fails


def test_who_diverges_altogether_does_not_take_the_others_results_along(finished, tmp_path, monkeypatch):
    folder, _, _ = finished
    fit = suite.fit

    def breaks(model, split, config, seed, title, checkpoint):
        if title.startswith("SASRec"):
            raise FloatingPointError("the loss is nan")
        return fit(model, split, config, seed, title, checkpoint)

    monkeypatch.setattr(suite, "BASELINES", FEW)
    monkeypatch.setattr(suite, "FUSIONS", {"Fusion": tuple(FEW)})
    monkeypatch.setattr(suite, "fit", breaks)
    with pytest.raises(FloatingPointError, match="SASRec softmax diverged with every setting of its grid"):
        suite.run_baselines(str(tmp_path), str(folder), [*FEW, "Fusion"], seeds=1, workers=1)
    results = read_results(tmp_path / "results.csv")
    assert {*results["method"]} == {"GRU4Rec", "popularity", "cooccurrence", "item_knn"}


def test_a_fit_that_was_stopped_goes_on(finished, tmp_path, monkeypatch):
    folder, _, _ = finished
    monkeypatch.setattr(suite, "BASELINES", FEW)
    job = suite.Job(replace(suite.QUICK, preset="baseline"), str(tmp_path), str(folder))
    save, saved = fitting._save, []

    def stops(path, *state):
        save(path, *state)
        saved.append(path)
        if len(saved) == 1:
            raise KeyboardInterrupt

    monkeypatch.setattr(fitting, "_save", stops)
    with pytest.raises(KeyboardInterrupt):
        suite.fit_baseline(job, "SASRec softmax", 0, 0)
    suite.fit_baseline(job, "SASRec softmax", 0, 0)
    run = suite.baseline_folder(job, "SASRec softmax", 0, 0)
    assert saved == [run.path / "checkpoints" / "fit.pt"] * 2  # one of each of two epochs
    assert run.finished
    assert not (run.path / "checkpoints").exists()
    again = replace(job, out=str(tmp_path / "undisturbed"))
    suite.fit_baseline(again, "SASRec softmax", 0, 0)
    of = suite.baseline_folder(again, "SASRec softmax", 0, 0).path
    for name in ("model.safetensors", "log.csv"):
        assert (run.path / name).read_bytes() == (of / name).read_bytes()


def test_all_seeds_begin_at_once_where_nothing_is_to_be_chosen(finished, tmp_path, monkeypatch):
    folder, _, _ = finished
    monkeypatch.setattr(suite, "BASELINES", FEW)
    begun = []
    work = suite.Crew.work
    fits = lambda tasks: [task.arguments[1:] for task in tasks if task.function is suite.fit_baseline]  # noqa: E731
    monkeypatch.setattr(suite.Crew, "work", lambda crew, tasks: begun.append(fits(tasks)) or work(crew, tasks))
    suite.run_baselines(str(tmp_path), str(folder), [*FEW], seeds=2, workers=1)
    assert begun[0] == [*(("GRU4Rec", number, 0) for number in range(3)), *(("SASRec softmax", 0, s) for s in (0, 1))]


def test_nobody_is_asked_for_more_than_it_reaches(finished, tmp_path, monkeypatch):
    """Of a model that reaches 12 items the test and a fusion ask for no more; of others for what new items need."""
    folder, _, _ = finished

    class Short(suite.SASRec):
        def __init__(self, *arguments, **options):
            super().__init__(*arguments, **options)
            self.reach = 12

        def best(self, histories, users, k):
            assert k <= 12
            return super().best(histories, users, k)

    monkeypatch.setattr(suite, "BASELINES", FEW)
    monkeypatch.setattr(suite, "FUSIONS", {"Fusion": tuple(FEW)})
    monkeypatch.setitem(suite.MODELS, "sasrec", Short)
    results = suite.run_baselines(str(tmp_path), str(folder), [*FEW, "Fusion"], seeds=1, workers=1)
    rows = results.pivot_table(index="metric", columns="method", values="value")
    assert (rows.loc["new/recall@5", ["SASRec softmax", "GRU4Rec", "Fusion"]] > 0).all()
    job = suite.Job(suite.replace(suite.QUICK, preset="baseline"), str(tmp_path), str(folder))
    test = job.world.split.test
    ranked = CoOccurrence().fit(job.world.split.sequences, 16).rank(test.history, 16).tolist()
    new = [[item for item in line if item not in held][:5] for line, held in zip(ranked, test.history, strict=True)]
    hits = [target in line for line, target in zip(new, test.target, strict=True)]
    assert rows.loc["new/recall@5", "cooccurrence"] == pytest.approx(sum(hits) / len(hits))


def test_worker_processes_give_the_numbers_of_one(finished, tmp_path):
    """With the settings of the package: a worker knows no others."""
    folder, _, _ = finished
    job = [suite.Job(suite.replace(suite.QUICK, preset="baseline"), str(tmp_path / name), str(folder)) for name in "ab"]
    suite.fit_baseline(job[0], "GRU4Rec", 0, 0)
    with suite.Crew(2) as crew:
        crew.work([suite.Task(suite.fit_baseline, (job[1], "GRU4Rec", number, 0), done=False) for number in (0, 1)])
    one, other = (pd.read_csv(suite.baseline_folder(of, "GRU4Rec", 0, 0).path / "log.csv") for of in job)
    pd.testing.assert_frame_equal(one, other)


def test_one_worker_takes_one_thread_and_gives_the_others_back():
    before, seen = torch.get_num_threads(), []

    def look():
        seen.extend([torch.get_num_threads(), *(pool["num_threads"] for pool in threadpool_info())])

    try:
        torch.set_num_threads(2)
        suite.Crew(1).work([suite.Task(look, (), done=False)])
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)
    assert len(seen) > 1
    assert set(seen) == {1}


def threads_of_the_svd(path):
    import scipy.linalg  # noqa: F401
    import sklearn.decomposition  # noqa: F401

    path.write_text(str([pool["num_threads"] for pool in threadpool_info()]))


def test_workers_take_one_thread_each(tmp_path, monkeypatch):
    for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
        monkeypatch.setenv(name, "2")
    with suite.Crew(2) as crew:
        crew.work([suite.Task(threads_of_the_svd, (tmp_path / name,), done=False) for name in "ab"])
    for name in "ab":
        assert set(json.loads((tmp_path / name).read_text())) == {1}


def test_unknown_names_say_so(finished, tmp_path):
    folder, _, _ = finished
    assert Catalog.load(folder).num_items == 16
    with pytest.raises(InputError, match=r"no baselines \['Bert'\]; there are SASRec, SASRec softmax"):
        suite.run_baselines(str(tmp_path), str(folder), ["Bert"])


def test_every_setting_of_every_grid_fits_its_model():
    for name, baseline in suite.BASELINES.items():
        for number in range(len(baseline.grid)):
            settings = baseline.chosen(number)
            given = (torch.arange(40).view(20, 2),) if settings.model in suite.OF_SIDS else (20, ["a"])
            assert suite.MODELS[settings.model](*given, **settings.options).num_items == 20, name
