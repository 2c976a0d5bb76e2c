"""Results as Markdown: docs/results, and the generated blocks of README.md and docs, all from the committed record."""

import argparse
import shutil
import sys
import tempfile
from collections.abc import Iterable, Mapping
from importlib import import_module
from pathlib import Path

import pandas as pd
import reference
from artefacts import RECORD
from pages import REASONING, Page, Record, Scores, World, dataset_name, fill, label, made_up, markdown_table
from PIL import Image
from policies import METRIC, NO_THINKING, PAIRS, SHOWN, START

from sapo.analysis.verdicts import Verdict, judge, sides
from sapo.common.files import write_atomically
from sapo.errors import InputError

HERE = Path(__file__).resolve().parent
TOP = HERE.parent
RESULTS = TOP / "docs" / "results"
ORDER = (
    "reasoning-world",
    "control-world",
    "real-catalogues",
    "other-recommenders",
    "laboratory",
    "ledger",
    "speed",
    "tokenizers",
)
METHODS = ("optimum", "sapo", "grpo", "grpo_step_reward", "sapo_outcome_reward", START, NO_THINKING, "cooccurrence")
OF_OTHERS = {("sapo", "grpo"): ("SAPO", "GRPO"), (START, NO_THINKING): ("thinking first", "not thinking")}
OF_REASONING = ((START, NO_THINKING), ("sapo", START), ("grpo", START), ("sapo", "grpo"))
DIAGRAM = (
    "docs/credit-units.png",
    (
        "One completion of K = 3 steps: GRPO spreads one advantage over all tokens, SAPO gives block k and code k the "
        "advantage of step k"
    ),
)
MAIN_FIGURES = {
    "fig_sparsity": "Gain of each objective against how rare an exact match is at the start",
    "fig_components": "Validation NDCG@10 over updates: SAPO, GRPO and the cells between them, from the same starts",
}
WIDTH, COLORS = 1400, 128  # of a picture: pixels, and entries of its palette


def make_pages(record: Record) -> list[Page]:
    """What every script page_*.py beside this one makes, in the order of the index.

    Raises:
        InputError: a script's input is missing or wrong; a page that the index does not know.
    """
    scripts = sorted(HERE.glob("page_*.py"))
    pages = [page for script in scripts for page in import_module(script.stem).main(record)]
    if unknown := {page.name for page in pages} - set(ORDER):
        raise InputError(f"no place in the index for {', '.join(sorted(unknown))}; there are {', '.join(ORDER)}.")
    return sorted(pages, key=lambda page: ORDER.index(page.name))


def index(pages: Iterable[Page]) -> str:
    """The page that lists the others."""
    lines = [f"- [{page.title}]({page.name}.md). {page.question} {page.answer}" for page in pages]
    intro = (
        "One page a question, made from the committed record (`paper_figures/data`) by `make results`: tables, figures "
        "and the sentences that say who is ahead. None of it is typed. Each page ends with the command that measures "
        "its numbers again."
    )
    return "\n\n".join(["# Results", intro, "\n".join(lines)]) + "\n"


def headline(record: Record) -> list[tuple[World, pd.DataFrame]]:
    """The worlds of the front page: of every data set the first preset that trained SAPO, in the order of
    `Record.worlds`; worlds of ours first."""
    chosen: dict[str, tuple[World, pd.DataFrame]] = {}
    for world, rows in record.worlds(""):
        kind = REASONING if world.dataset.startswith(REASONING) else world.dataset
        if "sapo" in set(rows["method"]):
            chosen.setdefault(kind, (world, rows))
    order = lambda world: (not world.dataset.startswith(REASONING), not made_up(world.dataset), world.dataset)  # noqa: E731
    return sorted(chosen.values(), key=lambda pair: order(pair[0]))


def results_table(record: Record) -> str:
    """At most eight methods, a column a data set."""
    tables = {dataset_name(world.dataset): record.scores(rows, METRIC) for world, rows in headline(record)}
    lines = []
    for name in METHODS:
        cells = {heading: scores.cell(name) for heading, scores in tables.items()}
        if any(cells.values()):
            lines.append({f"{SHOWN}, by item": label(name)} | cells)
    return markdown_table(pd.DataFrame(lines))


def finding(record: Record) -> str:
    """What was found: in the reasoning world what thinking, training and step credit are worth, elsewhere which ranks
    better; verdicts are those of the list on each world's own page."""
    worlds = {_place(world): record.scores(rows, METRIC) for world, rows in headline(record)}
    ours = {place for place, scores in worlds.items() if scores.world.dataset.startswith(REASONING)}
    verdicts = {
        (place, pair): verdict
        for place, scores in worlds.items()
        for pair, verdict in judge(scores.gains(OF_REASONING if place in ours else PAIRS)).items()
    }
    if not verdicts:
        return "Nothing is recorded yet."
    paragraphs = []
    for place in sorted(ours):
        of_place = {pair: verdict for (where, pair), verdict in verdicts.items() if where == place}
        paragraphs.append(where_thinking_pays(place, worlds[place], of_place))
    sentences = []
    for pair, names in OF_OTHERS.items():
        beside = {place: v for (place, its), v in verdicts.items() if its == pair and place not in ours}
        if beside:
            said = sides(beside, *names)
            sentences.append(f"{said[0].upper()}{said[1:]}.")
    note = (
        f"({SHOWN}, over users and seeds as far as the record has ranks of all test rows, after Holm's correction "
        "over the list of each page; [results](docs/results/README.md) has the numbers.)"
    )
    return "\n\n".join(" ".join(part) for part in ([*paragraphs], [*sentences, note]) if part)


def where_thinking_pays(place: str, scores: Scores, verdicts: Mapping[tuple[str, str], Verdict]) -> str:
    """What thinking, training and step credit are worth in one world.

    Args:
        place: what sentences call the world.
        verdicts: on pairs of `OF_REASONING`, first less second.
    """
    value = lambda name: f"{scores.mean(name).value:.3f}"  # noqa: E731
    sentences = []
    if thinking := verdicts.get((START, NO_THINKING)):
        words: dict[Verdict, str] = {
            "ahead": f"On {place} thinking pays",
            "behind": f"On {place} thinking does not pay",
            "equal": f"On {place} thinking changes nothing",
            "not told apart": f"On {place} it cannot be told whether thinking pays",
            "unknown": f"On {place} a single seed cannot tell whether thinking pays",
        }
        sentences.append(f"{words[thinking]}: {SHOWN} is {value(START)} with a thought, {value(NO_THINKING)} without.")
    trained = []
    for name in ("sapo", "grpo"):
        if over_start := verdicts.get((name, START)):
            words = {
                "ahead": f"{label(name)} gains over its start",
                "behind": f"{label(name)} falls below its start",
                "equal": f"{label(name)} ends where it started",
                "not told apart": f"{label(name)} cannot be told apart from its start",
                "unknown": f"a single seed says nothing of {label(name)} and its start",
            }
            trained.append(f"{words[over_start]} ({value(START)} → {value(name)})")
    if trained:
        said = "; ".join(trained)
        sentences.append(f"{said[0].upper()}{said[1:]}.")
    if credit := verdicts.get(("sapo", "grpo")):
        words = {
            "ahead": "Step credit is ahead of outcome credit.",
            "behind": "Outcome credit is ahead of step credit.",
            "equal": "Step credit and outcome credit come out the same.",
            "not told apart": "Step credit and outcome credit cannot be told apart.",
            "unknown": "A single seed says nothing of step credit against outcome credit.",
        }
        sentences.append(words[credit])
    return " ".join(sentences)


def _place(world: World) -> str:
    """What sentences call a world."""
    name = dataset_name(world.dataset)
    return f"the {name}" if made_up(world.dataset) else name


def figure(pages: Iterable[Page]) -> str:
    """The main figure: gain against sparsity, curves where one start alone is recorded, the diagram of credit where
    none is."""
    drawn = [name for page in pages for name in page.figures]
    for kind, caption in MAIN_FIGURES.items():
        if names := [name for name in drawn if name.split("-")[0] == kind]:
            return f"![{caption}](docs/results/figures/{names[0]}.png)"
    path, caption = DIAGRAM
    return f"![{caption}]({path})"


def documents(record: Record) -> dict[Path, str]:
    """Every file that is generated, or holds generated blocks, as it should be."""
    pages = make_pages(record)
    made = {RESULTS / f"{page.name}.md": page.text for page in pages} | {RESULTS / "README.md": index(pages)}
    blocks = {
        "README.md": {"figure": figure(pages), "finding": finding(record), "results": results_table(record)},
        "docs/objectives.md": {"objectives": reference.objectives()},
        "docs/systems.md": {"recommenders": reference.recommenders(), "systems": reference.systems()},
    }
    for name, contents in blocks.items():
        text = (TOP / name).read_text("utf-8")
        for block, content in contents.items():
            text = fill(text, block, content)
        made[TOP / name] = text
    return made


def draw(names: Iterable[str]) -> dict[str, bytes]:
    """Pictures of the record by the name of their artefact, small enough to be committed.

    Raises:
        InputError: a name that no script makes.
    """
    wanted, pictures = set(names), {}
    scripts = {name.split("-")[0] for name in wanted}
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder)
        for script in sorted(scripts):
            import_module(script).main(out)
        for name in sorted(wanted):
            path = out / "figures" / f"{name}.png"
            if not path.is_file():
                raise InputError(f"paper_figures/{name.split('-')[0]}.py makes no {name}.png of {RECORD}.")
            pictures[name] = _small(path)
    return pictures


def _small(path: Path) -> bytes:
    """A PNG of a limited width and palette."""
    with Image.open(path) as image:
        height = round(image.height * WIDTH / image.width)
        small = image.convert("RGB").resize((WIDTH, height), Image.Resampling.LANCZOS)
        small.quantize(COLORS, Image.Quantize.FASTOCTREE).save(path, optimize=True)
    return path.read_bytes()


def main(figures: bool = True) -> None:
    """Write everything, and remove what earlier records left under docs/results."""
    record = Record(RECORD)
    made = documents(record)
    for path, text in made.items():
        with write_atomically(path) as temporary:
            temporary.write_text(text, encoding="utf-8")
        print(path.relative_to(TOP))
    for path in set(RESULTS.glob("*.md")) - set(made):
        path.unlink()
    if figures:
        pictures = draw(name for page in make_pages(record) for name in page.figures)
        shutil.rmtree(RESULTS / "figures", ignore_errors=True)
        for name, content in pictures.items():
            with write_atomically(RESULTS / "figures" / f"{name}.png") as temporary:
                temporary.write_bytes(content)
            print((RESULTS / "figures" / f"{name}.png").relative_to(TOP))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--no-figures", action="store_true", help="write the texts alone")
    try:
        main(figures=not parser.parse_args().no_figures)
    except InputError as error:
        sys.exit(f"error: {error}")
