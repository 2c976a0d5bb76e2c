"""Every artefact of the paper from the tables under OUT, and OUT/index.html, which shows them with their provenance."""

import os
from html import escape
from importlib import import_module
from pathlib import Path

from artefacts import RECORD, Artefact, command_line

from sapo.analysis.tables import show_table
from sapo.common.files import write_atomically
from sapo.errors import InputError
from sapo.experiments.run_folder import read_recorded_runs, read_runs

HERE = Path(__file__).resolve().parent
STYLE = """
body { font-family: system-ui, sans-serif; max-width: 62rem; margin: 2rem auto; padding: 0 1rem; color: #222 }
section { border-top: 1px solid #ddd; margin-top: 2rem } img { max-width: 100%; height: auto }
.scroll { overflow: auto; max-height: 85vh } table { border-collapse: collapse; font-size: 0.8rem }
th, td { padding: 0.2rem 0.6rem; border-bottom: 1px solid #eee; text-align: right; white-space: nowrap }
#table_claims td { white-space: normal; text-align: left; min-width: 5rem }
thead th { position: sticky; top: 0; background: white; box-shadow: inset 0 -1px #222 }
code { background: #f4f4f4; padding: 0.1rem 0.3rem }
.source { font-size: 0.8rem; color: #555 }
"""


def make_artefacts(out: Path) -> list[tuple[str, Artefact]]:
    """Run every script beside this one, figures first; each artefact with the script it came from.

    Raises:
        InputError: a script's input is missing or wrong; no script, or no artefact.
    """
    scripts = [*sorted(HERE.glob("fig_*.py")), *sorted(HERE.glob("table_*.py"))]
    made = [(script.name, artefact) for script in scripts for artefact in import_module(script.stem).main(out)]
    if not made:
        raise InputError(f"no artefact came out of the scripts in {HERE}.")
    return made


def index_page(out: Path, made: list[tuple[str, Artefact]]) -> str:
    """The page: contents, every artefact, and the runs behind the measured numbers."""
    read = {artefact.read for _, artefact in made if artefact.read is not None}
    recorded = RECORD / "results.csv" in read
    runs = read_recorded_runs(RECORD) if recorded else read_runs(out)
    parts = [
        "<!doctype html>",
        '<html lang="en"><head><meta charset="utf-8"><title>sapo: figures and tables</title>',
        f"<style>{STYLE}</style></head><body>",
        "<h1>Figures and tables</h1>",
        "<p>Sources: <b>measured</b> numbers come from the runs listed below, <b>published</b> ones († in tables) are "
        "other people's, quoted with where they stand, <b>exact</b> ones (‡, dash-dotted lines) are computed.</p>",
    ]
    if recorded:
        parts.append(
            "<p><b>This folder has no results of its own; shown is the record that the repository carries.</b></p>"
        )
    parts += [
        "<ul>",
        *(f'<li><a href="#{escape(a.name)}">{escape(a.title)}</a>: {escape(a.name)}</li>' for _, a in made),
        "</ul>",
    ]
    for script, artefact in made:
        parts += _section(out, script, artefact)
    parts += ['<section id="runs"><h2>Runs</h2>']
    if runs.empty:
        parts.append("<p>None.</p>")
    else:
        seconds = runs["seconds"].dropna().astype(float).sum()  # text, where it comes from the record
        parts.append(f"<p>{len(runs)} runs, {seconds / 60:.1f} minutes of training and evaluation.</p>")
        text = runs.where(runs.notna(), "–").astype(str)
        parts.append(f'<div class="scroll">{text.to_html(index=False, border=0)}</div>')
    return "\n".join([*parts, "</section></body></html>"]) + "\n"


def _section(out: Path, script: str, artefact: Artefact) -> list[str]:
    links = {path.suffix[1:]: path.relative_to(out).as_posix() for path in artefact.files}
    if artefact.table is not None:
        shown = [f'<div class="scroll">{show_table(artefact.table).to_html()}</div>']
    else:
        shown = [f'<img src="{escape(links["png"])}" alt="{escape(artefact.title)}">']
    caption = [f"<p>{escape(artefact.caption)}</p>"]  # above a table, which may be long, below a figure
    origin = f"numbers: {escape(artefact.source)}" if artefact.source else "no numbers"
    if artefact.read is not None:
        origin += f", from <code>{escape(os.path.relpath(artefact.read, out))}</code>"
    files = ", ".join(f'<a href="{escape(link)}">{escape(kind)}</a>' for kind, link in links.items())
    return [
        f'<section id="{escape(artefact.name)}"><h2>{escape(artefact.title)}</h2>',
        *(caption + shown if artefact.table is not None else shown + caption),
        f'<p class="source">{origin}; files: {files}; '
        f"made by <code>python paper_figures/{escape(script)} --out {escape(_from_checkout(out))}</code></p></section>",
    ]


def _from_checkout(path: Path) -> str:
    """A path as one types it at the top of the checkout, where it lies inside."""
    path, top = path.resolve(), HERE.parent
    return str(path.relative_to(top) if path.is_relative_to(top) else path)


def main(out: Path) -> list[Artefact]:
    """Make everything, then the index."""
    made = make_artefacts(out)
    page = index_page(out, made)
    with write_atomically(out / "index.html") as temporary:
        temporary.write_text(page, encoding="utf-8")
    print(out / "index.html")
    return [artefact for _, artefact in made]


if __name__ == "__main__":
    command_line(main, __doc__, takes_results=False)
