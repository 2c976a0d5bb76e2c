"""Tables: numbers by hand, marks, and text that LaTeX and HTML take literally."""

import math
import re

import pandas as pd
import pytest

from sapo.analysis import tables
from sapo.analysis.tables import results_table, show_table, write_table
from sapo.errors import InputError


def results(method: str, metric: str, *values: float, source: str = "measured", dataset: str = "toy") -> pd.DataFrame:
    measured = source == "measured"
    return pd.DataFrame(
        {
            "source": source,
            "dataset": dataset,
            "split": "leave_one_out",
            "method": method,
            "preset": "quick" if measured else "",
            "seed": list(range(len(values))) if measured else [None],
            "metric": metric,
            "value": values,
            "n": 100,
            "run": "r",
        }
    )


@pytest.fixture
def table() -> pd.DataFrame:
    rows = [
        results("SAS_Rec & Co <1>", "recall@10", 0.9, source="published"),
        results("optimum", "recall@10", 0.8, source="exact"),
        results("stage2", "recall@10", 0.1),
        results("grpo", "recall@10", 0.2, 0.3, 0.4),
        results("sapo", "recall@10", 0.4, 0.5, 0.6),
        results("sapo", "ndcg@10", 0.3, 0.3, 0.3),
        results("sapo", "updates", 80, 80, 80),
        results("sapo", "learning_rate", 3e-4, 3e-4, 3e-4),
    ]
    return results_table(pd.concat(rows), ["recall@10", "ndcg@10"])


def test_numbers_and_order(table):
    assert table["method"].tolist() == [
        "SAPO (step-aligned)",
        "GRPO",
        "Stage 2 (no RL)",
        "Bayes optimum",
        "SAS_Rec & Co <1>",
    ]
    assert table["seeds"].fillna(0).tolist() == [3, 3, 1, 0, 0]  # published and exact numbers have none
    assert table["updates"][0] == 80
    assert table["updates"].isna().sum() == 4
    assert table["recall@10"].tolist() == pytest.approx([0.5, 0.3, 0.1, 0.8, 0.9])
    # t(0.975, 2) x std 0.1 / sqrt(3) = 4.302653 x 0.0577350
    assert table["recall@10_half"].tolist()[:2] == pytest.approx([0.2484138, 0.2484138], abs=1e-6)
    assert table["recall@10_half"].isna().tolist() == [False, False, True, True, True]
    assert table["ndcg@10"].notna().tolist() == [True, False, False, False, False]
    with pytest.raises(InputError, match=r"no rows of mrr; there are recall@10"):
        results_table(results("sapo", "recall@10", 0.1), ["mrr"])


def test_a_command_line_stays_one(tmp_path):
    """Two hyphens would be a dash in LaTeX; what is missing is one."""
    table = pd.DataFrame({"command": ["sapo run --seeds 3", ""]})
    text = write_table(table, tmp_path / "t")[1].read_text(encoding="utf-8")
    assert "sapo run -{}-seeds 3 " in text
    assert "\n-- " in text


def test_latex(table, tmp_path):
    csv, tex = write_table(table, tmp_path / "main", notes="A note.")
    text = tex.read_text(encoding="utf-8")
    lines = text.splitlines()
    assert lines[0] == "% A note."
    assert r"\begin{tabular}{lllllrrrrr}" in text
    assert [line for line in lines if line.startswith("\\") and "rule" in line] == [
        r"\toprule",
        r"\midrule",
        r"\bottomrule",
    ]
    assert r"toy & leave\_one\_out & quick & SAPO (step-aligned) & measured & 3 & 80 & 0.0003 & " in text
    assert r"\textbf{0.5000 $\pm$ 0.2484} & 0.3000 $\pm$ 0.0000 \\" in text  # no rival on NDCG@10
    assert r"\underline{0.3000 $\pm$ 0.2484} & -- \\" in text
    assert r"Bayes optimum$^\ddagger$ & exact" in text
    assert r"SAS\_Rec \& Co <1>$^\dagger$ & published & -- & -- & -- & 0.9000 & -- \\" in text  # no rival
    assert r"& \underline{0.1000} &" not in text  # third, and of one seed
    back = pd.read_csv(csv)
    assert list(back.columns) == list(table.columns)
    assert back["recall@10"].tolist() == pytest.approx(table["recall@10"].tolist())


def test_a_mean_of_fewer_seeds_is_not_ranked():
    """One lucky seed is no best method; a baseline without seeds takes part."""
    rows = [results("sapo", "recall@10", 0.4, 0.5, 0.6), results("grpo", "recall@10", 0.9)]
    rows += [results("popularity", "recall@10", 0.2)]
    ranks = tables._ranks(results_table(pd.concat(rows), ["recall@10"]))["recall@10"]
    assert ranks.fillna(0).tolist() == [1, 0, 2]  # SAPO, GRPO, popularity


def test_same_table_same_bytes(table, tmp_path):
    for name in ("a", "b"):
        write_table(table, tmp_path / name)
    assert (tmp_path / "a.csv").read_bytes() == (tmp_path / "b.csv").read_bytes()
    assert (tmp_path / "a.tex").read_bytes() == (tmp_path / "b.tex").read_bytes()
    assert show_table(table).to_html() == show_table(table).to_html()


def test_rows_are_ranked_within_dataset_and_ties_share_a_mark(tmp_path):
    rows = [
        results("grpo", "recall@10", 0.3, dataset="a"),
        results("sapo", "recall@10", 0.3 + 1e-9, dataset="a"),
        results("stage2", "recall@10", 0.2, dataset="a"),
        results("grpo", "recall@10", 0.1, dataset="b"),
    ]
    text = write_table(results_table(pd.concat(rows), ["recall@10"]), tmp_path / "t")[1].read_text("utf-8")
    assert text.count(r"\textbf{0.3000}") == 2
    assert text.count(r"\underline{0.2000}") == 1
    assert text.count(r"& 0.1000 \\") == 1  # alone in its data set
    assert text.count(r"\midrule") == 2


def test_html(table):
    page = show_table(table).to_html()
    assert "SAS_Rec &amp; Co &lt;1&gt;†" in page
    assert "<1>" not in page
    assert "0.5000 ± 0.2484" in page
    assert "font-weight: bold" in page
    assert "Recall@10" in page


def test_tables_on_one_page_keep_their_own_marks(table):
    reverse = table.iloc[::-1].reset_index(drop=True)
    marked = [re.findall(r"#(T_\w+)_row\d+_col\d+", show_table(shown).to_html()) for shown in (table, reverse)]
    assert marked[0]
    assert not set(marked[0]) & set(marked[1])


def test_columns_of_ones_own(tmp_path):
    table = pd.DataFrame(
        {"step reward": ["on", "off", ""], "ndcg@10": [0.2, math.nan, 0.1], "ndcg@10_half": [0.01] + 2 * [math.nan]}
    )
    text = write_table(table, tmp_path / "t")[1].read_text("utf-8")
    assert r"on & \textbf{0.2000 $\pm$ 0.0100} \\" in text
    assert r"off & -- \\" in text
    assert r"-- & \underline{0.1000} \\" in text


def test_long_text_is_wrapped_and_long_tables_run_over_pages(tmp_path):
    table = pd.DataFrame({"claim": ["word " * 20] * 60, "verdict": ["holds"] * 60})
    text = write_table(table, tmp_path / "t")[1].read_text("utf-8")
    assert r"\usepackage{booktabs,longtable}" in text
    assert r"\begin{longtable}{p{0.72\linewidth}l}" in text
    assert text.endswith("\\end{longtable}\n")
    assert r"\begin{tabular}{ll}" in write_table(table.assign(claim="short").head(3), tmp_path / "s")[1].read_text()
