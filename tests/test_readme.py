"""README and docs: generated parts are what the committed record gives, what they name exists, and their code runs.

No test here says which method is ahead or which sentence stands in a text: a new measurement changes both.
"""

import contextlib
import io
import re
import sys
from pathlib import Path

import pandas as pd
import pytest

from sapo.credit.objectives import OBJECTIVES
from sapo.experiments.suite import BASELINES, FUSIONS
from sapo.experiments.systems import SYSTEMS

ROOT = Path(__file__).resolve().parent.parent
RECORD = ROOT / "paper_figures" / "data"
RESULTS = ROOT / "docs" / "results"
TEXTS = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
MEGABYTES = 2e6  # of all committed figures together
FENCE = re.compile(r"(?P<before>[^\n]*)\n*^```(?P<language>\w*)\n(?P<code>.*?)^```$", re.DOTALL | re.MULTILINE)


@pytest.fixture(scope="module")
def generator():
    """paper_figures/make_pages.py, whose scripts import each other by name."""
    sys.path.insert(0, str(ROOT / "paper_figures"))
    try:
        import make_pages

        yield make_pages
    finally:
        sys.path.remove(str(ROOT / "paper_figures"))


@pytest.fixture(scope="module")
def documents(generator):
    return generator.documents(generator.Record(RECORD))


def test_generated_texts_are_those_of_the_record(documents):
    stale = [str(path.relative_to(ROOT)) for path, text in documents.items() if path.read_text("utf-8") != text]
    assert not stale, "`make results` writes them again"


def test_pages_and_figures_are_all_that_docs_results_holds(documents):
    assert {path for path in documents if path.parent == RESULTS} == set(RESULTS.glob("*.md"))
    shown = {
        name for path in RESULTS.glob("*.md") for name in re.findall(r"\(figures/(.+?)\)", path.read_text("utf-8"))
    }
    figures = list((RESULTS / "figures").iterdir())
    assert shown == {path.name for path in figures}
    assert sum(path.stat().st_size for path in figures) < MEGABYTES


def test_the_front_page_is_short():
    text = (ROOT / "README.md").read_text("utf-8")
    assert len(text.split()) < 1000
    assert len(text.splitlines()) <= 150
    table = re.search(r"<!-- generated: results -->(.*?)<!-- /generated -->", text, re.DOTALL)
    assert len(re.findall(r"^\|", table[1], re.MULTILINE)) <= 2 + 8


def test_every_measured_row_names_a_recorded_run():
    results, runs = pd.read_csv(RECORD / "results.csv", low_memory=False), pd.read_csv(RECORD / "runs.csv")
    measured = results[results["source"] == "measured"]
    world = ["dataset", "split", "preset", "run"]
    recorded = runs.assign(run=runs["run"].map(lambda path: Path(path).name))[world].drop_duplicates()
    joined = measured.merge(recorded, on=world, how="left", indicator=True)
    assert joined.loc[joined["_merge"] == "left_only", ["dataset", "preset", "method", "run"]].empty


def anchors(path: Path) -> set[str]:
    """What GitHub makes of a text's headings."""
    headings = re.findall(r"^#+ (.+)$", path.read_text("utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("path", TEXTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_lead_somewhere(path):
    for link in re.findall(r"\]\((?!https?:)([^)\s]+)\)", path.read_text("utf-8")):
        name, _, anchor = link.partition("#")
        target = (path.parent / name).resolve() if name else path
        assert target.is_file(), link
        assert not anchor or anchor in anchors(target), link


def test_files_and_tests_that_are_named_exist():
    text = "\n".join(path.read_text("utf-8") for path in TEXTS)
    tests = "".join(path.read_text("utf-8") for path in (ROOT / "tests").glob("test_*.py"))
    for name in re.findall(r"`(?:tests/)?(test_\w+\.py)`", text):
        assert (ROOT / "tests" / name).is_file(), name
    for name in re.findall(r"`(test_\w+)`", text):
        assert f"def {name}(" in tests, name
    for name in re.findall(r"`((?:fig|table)_\w+)`", text):
        assert (ROOT / "paper_figures" / f"{name}.py").is_file(), name
    for name in re.findall(r"`(0\d_\w+)`", text):
        assert (ROOT / "notebooks" / f"{name}.ipynb").is_file(), name
    for name in re.findall(r"`((?:sapo|tests|paper_figures|notebooks|docs)/(?!out/)[\w/.-]+\.\w+)`", text):
        assert (ROOT / name).is_file(), name


@pytest.mark.parametrize(
    ("page", "names"),
    [("objectives", OBJECTIVES), ("systems", {**BASELINES, **FUSIONS}), ("systems", SYSTEMS)],
    ids=["objectives", "recommenders", "systems"],
)
def test_every_name_has_a_row(page, names):
    rows = re.findall(r"^\| `(.+?)` \|", (ROOT / "docs" / f"{page}.md").read_text("utf-8"), re.MULTILINE)
    assert set(names) <= set(rows)


def blocks(path: Path) -> list[tuple[str, str, str]]:
    """Language, code and the line before of every fenced block."""
    found = FENCE.finditer(path.read_text("utf-8"))
    return [(match["language"], match["code"], match["before"]) for match in found]


def test_python_blocks_run_and_print_what_is_shown(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    ran = 0
    for path in TEXTS:
        fenced = blocks(path)
        for number, (language, code, before) in enumerate(fenced):
            if language != "python" or before.startswith("<!-- not run: needs"):
                continue
            printed = io.StringIO()
            with contextlib.redirect_stdout(printed):
                exec(compile(code, f"{path.name}, block {number + 1}", "exec"), {})
            if printed.getvalue():
                assert printed.getvalue() == fenced[number + 1][1], path.name
            ran += 1
    assert ran > 0


def test_the_credit_of_the_front_page_by_hand():
    """Step 1 is right three times of four: (1 - 3/4) / (1/2 + 1e-4) = .4999; step 3 once: (1 - 1/4) / (1/2 + 1e-4) =
    1.4997."""
    shown = next(code for _, code, _ in blocks(ROOT / "README.md") if code.startswith("tensor("))
    numbers = [float(number) for number in re.findall(r"-?\d\.\d+", shown)]
    assert numbers[0] == pytest.approx(0.25 / 0.5001, abs=5e-5)
    assert numbers[-1] == pytest.approx(0.75 / 0.5001, abs=5e-5)
