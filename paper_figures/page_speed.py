"""Speed: what reading a prompt once, flat tries and beam search save, and what more completions cost."""

import pandas as pd
from artefacts import find_timing, how_timed, setups
from pages import Page, Record, bullets, commands, markdown_table, picture
from table_group_size import per_group_size
from table_timing import seconds_per_update

FIGURE = "fig_scaling"


def ratios(rows: pd.DataFrame) -> pd.DataFrame:
    """A row a piece of work: against what, and how many times faster."""
    lines = []
    for what, of_what in rows.groupby("what", sort=False):
        ours, theirs = (of_what[(of_what["who"] == "ours") == mine].iloc[0] for mine in (True, False))
        known = pd.notna(ours["peak_bytes"]) and pd.notna(theirs["peak_bytes"])
        lines.append(
            {
                "work": what,
                "against": theirs["who"],
                "faster": f"{theirs['seconds'] / ours['seconds']:.1f} ×",
                "share of its memory": f"{ours['peak_bytes'] / theirs['peak_bytes']:.0%}" if known else "",
            }
        )
    return pd.DataFrame(lines)


def sentences(rows: pd.DataFrame) -> list[str]:
    """What a step of SAPO costs beside GRPO's, what more completions cost, how long a request waits."""
    steps = rows[rows["axis"] == "step"].set_index("who")["seconds"]
    groups = rows[(rows["axis"] == "completions a prompt") & (rows["who"] == "ours")]
    seconds = groups.pivot(index="value", columns="what", values="seconds").sort_index()
    few, many = seconds.index[0], seconds.index[-1]
    said = [f"A training step of SAPO takes {steps['sapo'] / steps['grpo']:.2f} of the time of one of GRPO."]
    said += [
        f"From G = {few:g} to {many:g}, {many / few:g} times the completions cost "
        f"{seconds.loc[many, what] / seconds.loc[few, what]:.1f} times the time of {what}."
        for what in seconds.columns
    ]
    asked = rows[rows["axis"] == "requests"].sort_values("value")
    waits = [f"{1e3 * row.seconds / row.value:.1f} ms with {row.value:g} at a time" for row in asked.itertuples()]
    said.append(f"Latency of a top-10 request ({setups(asked)}): {', '.join(waits)}.")
    trie = rows[(rows["what"] == "trie build") & (rows["who"] == "ours")].dropna(subset=["value", "peak_bytes"])
    largest = trie.loc[trie["value"].idxmax()]
    said.append(f"A trie of {largest['value']:,.0f} items holds {largest['peak_bytes'] / 1e6:.0f} MB.")
    return said


def main(record: Record) -> list[Page]:
    """One page, from timing.csv."""
    _, rows = find_timing(record.folder, record.folder / "timing.csv")
    compared, steps = rows[rows["axis"] == "ratio"], rows[rows["axis"] == "step"]
    table, said = ratios(compared), sentences(rows)
    blocks = [
        "Prompts are long here, a prompt's G completions are short, and the last K tokens come from a catalogue. So a "
        "prompt is read once for all of its completions: in rollouts, in the update (with gradients), for the "
        "reference policy, in beam search. The model sees real tokens only, no padding; a finished rollout reads "
        "nothing more; what may follow a prefix is one gather from a trie of flat arrays. Results are the same, "
        "log-probabilities, gradients and beams: `make bench` asserts it in the run that it times.",
        f"{how_timed(compared)} Another machine, and another hour on it, gives other ratios.",
        markdown_table(table),
        bullets(said),
        "## One training step",
        f"{setups(steps)}.",
        markdown_table(seconds_per_update(steps)),
        "## More completions a prompt",
        markdown_table(per_group_size(rows[rows["axis"] == "completions a prompt"])),
        picture(FIGURE, "How seconds and memory grow."),
        "`SAPOConfig(share_prompts=False)` reads prompts as TRL does. On a GPU, with a random model as large as "
        "Qwen3-0.6B (not measured yet): `python -m benchmarks --device cuda --dtype bfloat16 --size large`.",
        "## Make it again",
        commands(["python -m benchmarks --record paper_figures/data"]),
    ]
    step = table[table["work"] == "training step"]
    answer = " ".join(
        [*(f"{row.work}, against {row.against}: {row.faster} faster." for row in step.itertuples()), said[0]]
    )
    question = "How fast are training, rollouts and search, against what one would run instead?"
    return [Page("speed", "Speed", question, answer, tuple(blocks), (FIGURE,))]
