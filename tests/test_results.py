"""The results table: what it accepts, what it refuses and where, and that it writes the same bytes."""

import numpy as np
import pandas as pd
import pytest

from sapo.analysis.results import COLUMNS, merge_results, name_hits, read_results, write_results
from sapo.errors import InputError

HEADER = ",".join(COLUMNS)
MEASURED = "measured,toy,leave_one_out,sapo,quick,{seed},recall@10,{value},100,toy/seed{seed}/sapo"
PUBLISHED = "published,office,published_test,SASRec,,,recall@10,0.1167,4866,arXiv 2603.23183 Table 2"


def rows(*values: float, method: str = "sapo") -> pd.DataFrame:
    return pd.DataFrame(
        {
            "source": "measured",
            "dataset": "toy",
            "split": "leave_one_out",
            "method": method,
            "preset": "quick",
            "seed": range(len(values)),
            "metric": "recall@10",
            "value": values,
            "n": 100,
            "run": [f"toy/seed{seed}" for seed in range(len(values))],
        }
    )


def write(path, *lines: str):
    path.write_text("\n".join([HEADER, *lines]) + "\n", encoding="utf-8")
    return path


def test_read(tmp_path):
    table = read_results(write(tmp_path / "results.csv", MEASURED.format(seed=1, value=0.25), PUBLISHED))
    assert tuple(table.columns) == COLUMNS
    published, measured = table.iloc[0], table.iloc[1]  # in the order of the key: office before toy
    assert (published["method"], published["value"], published["n"]) == ("SASRec", 0.1167, 4866)
    assert published["seed"] is pd.NA
    assert published["preset"] == ""
    assert (measured["seed"], measured["value"], measured["run"]) == (1, 0.25, "toy/seed1/sapo")


def test_write_is_exact_and_independent_of_order(tmp_path):
    values = np.random.default_rng(0).random(20)
    table = rows(*values, 1 / 3, 1e-17, 1.0)
    write_results(table, tmp_path / "a.csv")
    write_results(table.sample(frac=1, random_state=0), tmp_path / "b.csv")
    assert (tmp_path / "a.csv").read_bytes() == (tmp_path / "b.csv").read_bytes()
    back = read_results(tmp_path / "a.csv")
    assert back["value"].tolist() == table["value"].tolist()
    write_results(back, tmp_path / "c.csv")
    assert (tmp_path / "a.csv").read_bytes() == (tmp_path / "c.csv").read_bytes()
    assert b"\r" not in (tmp_path / "a.csv").read_bytes()


def test_a_failed_write_leaves_the_earlier_file(tmp_path):
    path = tmp_path / "results.csv"
    write_results(rows(0.5), path)
    before = path.read_bytes()
    with pytest.raises(InputError, match="value"):
        write_results(rows(float("nan")), path)
    assert path.read_bytes() == before
    assert [file.name for file in tmp_path.iterdir()] == ["results.csv"]


def test_merge_replaces_rows_of_the_same_key():
    merged = merge_results(rows(0.1, 0.2), pd.concat([rows(0.9), rows(0.3, method="grpo")]))
    found = {(row.method, row.seed): row.value for row in merged.itertuples()}
    assert found == {("sapo", 0): 0.9, ("sapo", 1): 0.2, ("grpo", 0): 0.3}


def test_merge_refuses_a_key_twice_in_one_table():
    with pytest.raises(InputError, match=r"added results.*second row of .*method sapo.*seed 0"):
        merge_results(rows(0.1), pd.concat([rows(0.2), rows(0.3)]))


def test_hits_have_the_same_name_whatever_a_method_ranks():
    """The SASRec of one preset ranks items, a policy SIDs; the synthetic optimum both; a paper says which itself."""
    kept = {
        ("measured", "sapo"): {"ndcg@10": 0.3, "item/ndcg@10": 0.2, "recall@5": 0.5, "full/ndcg@10": 0.1, "updates": 9},
        ("measured", "SASRec"): {"ndcg@10": 0.4, "sid/ndcg@10": 0.6, "new/ndcg@10": 0.7},
        ("measured", "HSTU"): {"ndcg@10": 0.8},
        ("published", "TIGER"): {"ndcg@10": 0.9},
        ("exact", "optimum"): {"recall@5": 1.0},
    }
    world = {"dataset": "toy", "split": "leave_one_out", "preset": "quick", "seed": 0, "n": 5, "run": "r"}
    table = pd.DataFrame(
        {**world, "source": source, "method": method, "metric": metric, "value": value}
        for (source, method), values in kept.items()
        for metric, value in values.items()
    )
    named = name_hits(table)
    assert sorted(named[["method", "metric", "value"]].itertuples(index=False, name=None)) == sorted(
        [
            ("sapo", "sid/ndcg@10", 0.3),
            ("sapo", "item/ndcg@10", 0.2),
            ("sapo", "sid/recall@5", 0.5),  # by item it is not in the table
            ("sapo", "full/ndcg@10", 0.1),
            ("sapo", "updates", 9),
            ("SASRec", "item/ndcg@10", 0.4),
            ("SASRec", "sid/ndcg@10", 0.6),
            ("SASRec", "new/ndcg@10", 0.7),
            ("HSTU", "item/ndcg@10", 0.8),
            ("TIGER", "sid/ndcg@10", 0.9),
            ("optimum", "item/recall@5", 1.0),
            ("optimum", "sid/recall@5", 1.0),
        ]
    )
    assert name_hits(named).equals(named)  # nothing plain is left


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (PUBLISHED.replace("published,", "guessed,", 1), "line 3: source is 'guessed'"),
        (PUBLISHED.replace("published_test", "random"), "line 3: split is 'random'"),
        (PUBLISHED.replace("SASRec", ""), "line 3: method is empty"),
        (PUBLISHED.replace("0.1167", "high"), "line 3: value is 'high'"),
        (PUBLISHED.replace("0.1167", ""), "line 3: value is ''"),
        (PUBLISHED.replace("0.1167", "inf"), "line 3: value is 'inf'"),
        (PUBLISHED.replace("4866", "4866.5"), "line 3: n is '4866.5'"),
        (PUBLISHED.replace("SASRec,,", "SASRec,,one"), "line 3: seed is 'one'"),
        (MEASURED.format(seed=1, value=0.5), "line 3: a second row of dataset toy"),
    ],
)
def test_bad_rows_are_named_by_file_and_line(tmp_path, line, message):
    path = write(tmp_path / "results.csv", MEASURED.format(seed=1, value=0.25), line)
    with pytest.raises(InputError, match=message) as error:
        read_results(path)
    assert str(path) in str(error.value)


def test_bad_files(tmp_path):
    with pytest.raises(InputError, match="no such file"):
        read_results(tmp_path / "none.csv")
    (tmp_path / "empty.csv").touch()
    (tmp_path / "latin.csv").write_bytes(HEADER.encode() + "\nmeasured,caf\u00e9".encode("latin-1"))
    for name in ("empty.csv", "latin.csv"):
        with pytest.raises(InputError, match="not a CSV table in UTF-8"):
            read_results(tmp_path / name)
    (tmp_path / "short.csv").write_text("source,dataset\n")
    with pytest.raises(InputError, match="no column 'split'"):
        read_results(tmp_path / "short.csv")
