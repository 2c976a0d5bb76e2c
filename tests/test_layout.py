"""Reading completions, against a reader that walks token by token and keeps its state in plain variables."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from worlds import CLOSE, EOS, OPEN, PAD, layout_for

from sapo.decoding.layout import ReasoningLayout
from sapo.errors import InputError

SIZES = (3, 2, 4)
LAYOUT = layout_for(SIZES)
TOKEN = [[int(token) for token in ids] for ids in LAYOUT.sid_token_ids]  # level, code -> token
WORD, NEWLINE = 90, 91
A, B, C = TOKEN[0][2], TOKEN[1][1], TOKEN[2][3]
BLOCK = [OPEN, WORD, CLOSE]
GOOD = [*BLOCK, OPEN, CLOSE, *BLOCK, A, B, C]


def walk(layout: ReasoningLayout, tokens: list[int]) -> tuple[list[int], list[int], bool]:
    """Steps of the tokens, codes, and whether the completion is well formed."""
    names = {int(t): (level, code) for level, ids in enumerate(layout.sid_token_ids) for code, t in enumerate(ids)}
    total, inside = layout.num_steps, False
    blocks = total if layout.num_blocks is None else layout.num_blocks
    kinds: list[tuple[str, int]] = []  # ("block", which) | ("sid", -) | ("other", -)
    begun, malformed, sid_seen = 0, False, False
    for token in tokens:
        if inside:
            malformed |= token == layout.think_start_id  # nested
            kinds.append(("block", begun - 1))
            inside = token != layout.think_end_id
        elif token == layout.think_start_id:
            malformed |= sid_seen  # a block after a SID token
            kinds.append(("block", begun))
            begun, inside = begun + 1, True
        elif token in names:
            sid_seen = True
            kinds.append(("sid", 0))
        else:
            kinds.append(("other", 0))
    malformed |= inside or begun != blocks or sum(kind == "sid" for kind, _ in kinds) != total
    last_of_blocks = max((t for t, (kind, _) in enumerate(kinds) if kind == "block"), default=-1)
    steps, codes, found = [], [-1] * total, 0
    for t, (kind, which) in enumerate(kinds):
        step = -1
        if kind == "block":
            step = which if blocks == total else -1
        elif kind == "sid" and t > last_of_blocks:
            step, found = found, found + 1
            level, code = names[tokens[t]]
            if step < total and level == step:
                codes[step] = code
        steps.append(step if step < total else -1)
    return steps, codes, not malformed and -1 not in codes


def read(tokens: list[int], layout: ReasoningLayout = LAYOUT) -> tuple[list[int], list[int], bool]:
    ids = torch.tensor([tokens])
    sids, well_formed = layout.parse(ids)
    return layout.token_steps(ids)[0].tolist(), sids[0].tolist(), well_formed.item()


def test_picture_of_the_module():
    steps, sids, well_formed = read([*GOOD, EOS, PAD, PAD])
    assert steps == [0, 0, 0, 1, 1, 2, 2, 2, 0, 1, 2, -1, -1, -1]
    assert sids == [2, 1, 3]
    assert well_formed


@pytest.mark.parametrize(
    ("tokens", "steps", "sids"),
    [
        # newlines after and between blocks and SID tokens
        (
            [*BLOCK, NEWLINE, *BLOCK, *BLOCK, NEWLINE, A, NEWLINE, B, C, NEWLINE, EOS],
            [0, 0, 0, -1, 1, 1, 1, 2, 2, 2, -1, 0, -1, 1, 2, -1, -1],
            [2, 1, 3],
        ),
        # SID tokens inside a block are its text, also of the block that mentions a whole SID
        ([OPEN, A, B, C, CLOSE, *BLOCK, *BLOCK, A, B, C], [0] * 5 + [1] * 3 + [2] * 3 + [0, 1, 2], [2, 1, 3]),
        # EOS and padding inside a block are its text
        ([OPEN, EOS, PAD, CLOSE, *BLOCK, *BLOCK, A, B, C], [0] * 4 + [1] * 3 + [2] * 3 + [0, 1, 2], [2, 1, 3]),
    ],
)
def test_well_formed(tokens, steps, sids):
    assert read(tokens) == (steps, sids, True)


@pytest.mark.parametrize(
    ("fault", "tokens", "steps", "sids"),
    [
        ("nested", [OPEN, OPEN, CLOSE, *BLOCK, *BLOCK, A, B, C], [0] * 3 + [1] * 3 + [2] * 3 + [0, 1, 2], [2, 1, 3]),
        ("unclosed", [*BLOCK, *BLOCK, OPEN, WORD, A, B, C], [0] * 3 + [1] * 3 + [2] * 5, [-1] * 3),
        ("a block less", [*BLOCK, *BLOCK, A, B, C], [0] * 3 + [1] * 3 + [0, 1, 2], [2, 1, 3]),
        ("a block more", [*BLOCK] * 4 + [A, B, C], [0] * 3 + [1] * 3 + [2] * 3 + [-1] * 3 + [0, 1, 2], [2, 1, 3]),
        ("no block", [A, B, C], [0, 1, 2], [2, 1, 3]),
        ("a SID token less", GOOD[:-1], [0, 0, 0, 1, 1, 2, 2, 2, 0, 1], [2, 1, -1]),
        ("a SID token more", [*GOOD, A], [0, 0, 0, 1, 1, 2, 2, 2, 0, 1, 2, -1], [2, 1, 3]),
        ("a wrong level", [*GOOD[:-2], C, C], [0, 0, 0, 1, 1, 2, 2, 2, 0, 1, 2], [2, -1, 3]),
        ("levels swapped", [*GOOD[:-3], B, A, C], [0, 0, 0, 1, 1, 2, 2, 2, 0, 1, 2], [-1, -1, 3]),
        (
            "a block after a SID token",
            [*BLOCK, *BLOCK, A, *BLOCK, B, C],
            [0] * 3 + [1] * 3 + [-1] + [2] * 3 + [0, 1],
            [-1, -1, -1],
        ),
        ("a SID token first", [A, *GOOD[:-3], B, C], [-1, 0, 0, 0, 1, 1, 2, 2, 2, 0, 1], [-1, -1, -1]),
        ("text only", [WORD, EOS, PAD], [-1] * 3, [-1] * 3),
        ("padding only", [PAD, PAD], [-1] * 2, [-1] * 3),
    ],
)
def test_malformed(fault, tokens, steps, sids):
    assert read(tokens) == (steps, sids, False), fault


@settings(max_examples=250, deadline=None)
@given(st.data())
def test_any_tokens_against_the_walk(data):
    """Batches of ragged rows, padded on the right: nearly good completions with a few edits, and plain noise."""
    sizes = data.draw(st.sampled_from([(2,), (2, 3), (3, 2, 4), (2, 2, 2, 2)]))
    layout = replace(layout_for(sizes), num_blocks=data.draw(st.sampled_from([None, None, 0, 1])))
    alphabet = [PAD, EOS, OPEN, CLOSE, WORD, -100, *(t for ids in layout.sid_token_ids for t in ids.tolist())]
    token = st.sampled_from(alphabet + [OPEN, CLOSE] * 3)
    rows = []
    for _ in range(data.draw(st.integers(1, 4))):
        if data.draw(st.booleans()):
            row = data.draw(st.lists(token, max_size=24))
        else:
            row = []
            for _ in range(layout.blocks):
                row += [OPEN, *data.draw(st.lists(st.sampled_from([WORD, EOS, *alphabet[6:]]), max_size=3)), CLOSE]
            row += [data.draw(st.sampled_from(ids.tolist())) for ids in layout.sid_token_ids]
            for _ in range(data.draw(st.integers(0, 2))):
                place = data.draw(st.integers(0, len(row) - 1))
                width = data.draw(st.integers(0, 1))  # insert or replace
                row[place : place + width] = [data.draw(token)]
        rows.append(row)
    length = max(1, max(map(len, rows)))
    padded = [row + [PAD] * (length - len(row)) for row in rows]
    ids = torch.tensor(padded)
    steps, (sids, well_formed) = layout.token_steps(ids), layout.parse(ids)
    assert steps.dtype == sids.dtype == torch.long
    assert well_formed.dtype == torch.bool
    for i, row in enumerate(padded):
        assert (steps[i].tolist(), sids[i].tolist(), well_formed[i].item()) == walk(layout, row)


@pytest.mark.parametrize(
    ("blocks", "tokens", "steps"),
    [
        (0, [A, B, C, EOS], [0, 1, 2, -1]),
        (1, [*BLOCK, A, B, C], [-1, -1, -1, 0, 1, 2]),  # a block before the whole SID belongs to no step
        (3, GOOD, [0, 0, 0, 1, 1, 2, 2, 2, 0, 1, 2]),
    ],
)
def test_other_numbers_of_blocks(blocks, tokens, steps):
    for asked in (0, 1, 3):
        layout = replace(LAYOUT, num_blocks=asked)
        found, sids, well_formed = read(tokens, layout)
        assert (sids, well_formed) == ([2, 1, 3], asked == blocks)
        if asked == blocks:
            assert found == steps
    with pytest.raises(InputError, match="num_blocks is -1"):
        replace(LAYOUT, num_blocks=-1)


def test_left_padding_moves_nothing():
    """Completions stand right of their prompts; padding before them is text outside blocks."""
    steps, sids, well_formed = read([PAD, PAD, *GOOD])
    assert steps == [-1, -1, *walk(LAYOUT, GOOD)[0]]
    assert (sids, well_formed) == ([2, 1, 3], True)


def test_token_ids_need_no_order():
    """Codes may lie anywhere in the vocabulary, above and below the delimiters."""
    layout = ReasoningLayout(2, 50, 10, [torch.tensor([99, 3]), torch.tensor([51, 0, 7])])
    steps, sids, well_formed = read([50, 4, 10, 50, 10, 1000, 3, 7], layout)
    assert steps == [0, 0, 0, 1, 1, -1, 0, 1]
    assert (sids, well_formed) == ([1, 2], True)
    # negative ids are padding of labels: no name for a code, although token 0 is one
    assert read([50, 4, 10, 50, 10, 3, 7, -1, -100], layout) == ([0, 0, 0, 1, 1, 0, 1, -1, -1], [1, 2], True)


def test_levels_must_be_k():
    with pytest.raises(InputError, match=r"num_steps is 2.* 3 levels"):
        ReasoningLayout(2, OPEN, CLOSE, LAYOUT.sid_token_ids)


@pytest.mark.parametrize(
    ("start", "end", "ids"),
    [
        (2, 2, [[4, 5], [6, 7]]),
        (4, 3, [[4, 5], [6, 7]]),
        (2, 3, [[4, 5], [5, 6]]),
        (2, 3, [[4, 4], [5, 6]]),
    ],
)
def test_tokens_with_two_meanings_are_refused(start, end, ids):
    with pytest.raises(InputError, match="distinct"):
        ReasoningLayout(2, start, end, [torch.tensor(level) for level in ids])
