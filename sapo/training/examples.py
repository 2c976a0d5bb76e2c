"""What stages 1 and 2 train on, made when asked for.

Row i depends on (seed, first + i) alone, so a resumed run sees the same rows, and a stage that goes on with a task sees
others than the stage before it.

Compact, for small models. LC-Rec (arXiv 2311.09049) aligns SIDs with language by more tasks: what the next item is
called after a history of SIDs, and the next SID after a history of titles.

    next item     <bos> SID SID ... SID
    SID to words  <bos> SID <title> words <eos>                and     <bos> <item> words SID <eos>
    alignment     <bos> SID ... SID <item> words <eos>         and     <bos> <title> words ... <title> words SID <eos>
    thinking      <bos> SID ... SID <think> words </think> ... SID <eos>

In sentences, for pretrained models: the streams of the paper's fork (zhengzaiyi/SIDReasoner), each row once an epoch.
Whatever is asked, the loss sees the answer; of the last two it sees all.

    of every training row     the next SID or title after SIDs or titles (four streams)
    of every item             its title for its SID, its SID for its title
    of every training row     SIDs and titles of its items, one after the other
    of every item             its SID and title

Conversations about anything may be mixed with them; of each the last answer is learnt.
"""

from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from sapo.data.interactions import Rows, Split
from sapo.errors import InputError
from sapo.policy.chat import ChatWording
from sapo.policy.policy import Policy
from sapo.policy.prompts import BOS, EOS, ITEM_OF, TITLE_OF, sid_text, title_words
from sapo.training.conversations import Conversation
from sapo.training.traces import Traces

SFTTask = Literal["next_item", "alignment", "thinking"]
IGNORED = -100  # the label that the loss skips
# Of the examples of "alignment": title words after a history, and a SID after a history of title words. As many
# translate single items; half are next items.
ALIGNED = 0.25
SHOWN_TITLES = 5  # of such a history, the last items
LONGEST, LONGEST_CONVERSATION = 1024, 3072  # tokens of an example in sentences; what is longer loses its beginning


class Examples(torch.utils.data.Dataset):
    """Token ids and labels of compact prompts.

    Args:
        task: "next_item" (stage 1 and the control), "alignment" (both stages of LC-Rec) or "thinking" (stage 2).
        title_share: of the examples that translate between SIDs and title words.
        first: how many examples of the task the policy has seen in a stage before.

    Raises:
        InputError: no training row; thinking without traces.
    """

    def __init__(
        self,
        policy: Policy,
        split: Split,
        task: SFTTask,
        length: int,
        seed: int,
        traces: Traces | None = None,
        title_share: float = 0.0,
        first: int = 0,
    ):
        self.policy, self.task, self.length, self.seed = policy, task, length, seed
        self.traces, self.title_share, self.first = traces, title_share, first
        self.known = policy.tokenizer.get_vocab()
        self.sequences = [sequence for sequence in split.sequences if len(sequence) > 1]
        self.rows = _rows(split, task, traces)

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> dict[str, list[int]]:
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: Sequence[int]) -> list[dict[str, list[int]]]:
        """A batch at once, as torch's loader asks for it: the tokenizer takes long over a call, not over its texts."""
        return _encoded(self.policy, [self._texts(index) for index in indices])

    def _texts(self, index: int) -> tuple[str, str]:
        """Prompt and answer."""
        rng = np.random.default_rng((self.seed, self.first + index))
        catalog = self.policy.catalog
        share = rng.random()
        if share < self.title_share:
            item = int(rng.integers(catalog.num_items))
            sid, words = sid_text(catalog, item), self._words(item)
            if words and rng.random() < 0.5:
                return " ".join([BOS, ITEM_OF, *words]), f"{sid} {EOS}"
            return f"{BOS} {sid} {TITLE_OF}", " ".join([*words, EOS])
        if self.task == "alignment" and share < self.title_share + ALIGNED:
            row = int(rng.integers(len(self.rows)))
            history, target = self.rows.history[row], self.rows.target[row]
            if rng.random() < 0.5:
                titles = (" ".join([TITLE_OF, *self._words(item)]) for item in history[-SHOWN_TITLES:])
                return " ".join([BOS, *titles]), f"{sid_text(catalog, target)} {EOS}"
            prompt = self.policy.prompts([history])[0]
            return f"{prompt} {ITEM_OF}", " ".join([*self._words(target), EOS])
        if self.traces is not None and self.task == "thinking":
            row = int(rng.integers(len(self.rows)))
            history, target = self.rows.history[row], self.rows.target[row]
            thoughts = self.policy.wording.blocks(self.traces.of_row(history, target))
            answer = f"{thoughts} {sid_text(catalog, target)} {EOS}"
            return self.policy.prompts([history])[0], answer
        # A window of a sequence trains every next item in it at once.
        sequence = self.sequences[int(rng.integers(len(self.sequences)))]
        end = int(rng.integers(2, len(sequence) + 1)) if len(sequence) > self.policy.max_history + 1 else len(sequence)
        first, *rest = sequence[max(0, end - self.policy.max_history - 1) : end]
        return f"{BOS} {sid_text(catalog, first)}", " ".join(sid_text(catalog, item) for item in rest)

    def _words(self, item: int) -> list[str]:
        return title_words(self.policy.catalog.titles[item], self.known)


class ChatExamples(torch.utils.data.Dataset):
    """Token ids and labels in sentences. Every stream is gone through once before any row comes again.

    Args:
        task: "next_item" (stage 1 and the control: all streams) or "thinking" (stage 2).
        first: how many examples of the task the policy has seen in a stage before.
        conversations: one more stream of "next_item".

    Raises:
        InputError: no training row; thinking without traces; the task of LC-Rec, which is one of stage 1's streams;
            turns that the model's chat template refuses.
    """

    def __init__(
        self,
        policy: Policy,
        split: Split,
        task: SFTTask,
        length: int,
        seed: int,
        traces: Traces | None = None,
        first: int = 0,
        conversations: Sequence[Conversation] = (),
    ):
        if not isinstance(policy.wording, ChatWording):
            raise InputError("these examples are of policies that are asked in sentences.")
        if task == "alignment":
            raise InputError("in sentences, the tasks of LC-Rec are streams of stage 1: use the task 'next_item'.")
        self.policy, self.wording, self.length, self.seed, self.first = policy, policy.wording, length, seed, first
        self.traces, self.rows = traces, _rows(split, task, traces)
        of_rows, of_items = len(self.rows), [item for item, title in enumerate(policy.catalog.titles) if title]
        self.items, self.start = of_items, policy.tokenizer.bos_token or ""
        self.streams: list[tuple[Callable[[int], tuple[str, str]], int]] = (
            [(self._thinking, of_rows)]
            if task == "thinking"
            else [
                (self._next_sid, of_rows),
                (self._next_title, of_rows),
                (self._next_title_by_titles, of_rows),
                (self._next_sid_by_titles, of_rows),
                (self._title_of, len(of_items)),
                (self._sid_of, len(of_items)),
                (self._items_in_text, of_rows),
                (self._item_in_text, len(of_items)),
                (self._conversation, len(conversations)),
            ]
        )
        self.conversations = [(self.wording.reply_to(one.turns), one.answer) for one in conversations]
        self._ends = np.cumsum([rows for _, rows in self.streams])
        self._order = lru_cache(maxsize=2)(
            lambda epoch: np.random.default_rng((seed, epoch)).permutation(int(self._ends[-1]))
        )

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> dict[str, list[int]]:
        epoch, at = divmod(self.first + index, int(self._ends[-1]))
        place = int(self._order(epoch)[at])
        stream = int(np.searchsorted(self._ends, place, side="right"))
        make, rows = self.streams[stream]
        prompt, answer = make(place - int(self._ends[stream]) + rows)
        [example] = _encoded(self.policy, [(prompt, f"{answer}{self.policy.tokenizer.eos_token}")])
        longest = LONGEST_CONVERSATION if make == self._conversation else LONGEST
        example = {name: values[-longest:] for name, values in example.items()}
        example["labels"][0] = IGNORED  # nothing predicts the first token
        return example

    def _thinking(self, row: int) -> tuple[str, str]:
        history, target = self._row(row)
        assert self.traces is not None
        thoughts = self.wording.blocks(self.traces.of_row(history, target))
        return self.wording.ask(history, thinking=True), thoughts + self.wording.name(target)

    def _next_sid(self, row: int) -> tuple[str, str]:
        history, target = self._row(row)
        return self.wording.ask(history, thinking=False), self.wording.name(target)

    def _next_title(self, row: int) -> tuple[str, str]:
        history, target = self._row(row)
        return self.wording.ask_for_title(history, by_titles=False), self._title(target)

    def _next_title_by_titles(self, row: int) -> tuple[str, str]:
        history, target = self._row(row)
        return self.wording.ask_for_title(history, by_titles=True), self._title(target)

    def _next_sid_by_titles(self, row: int) -> tuple[str, str]:
        history, target = self._row(row)
        return self.wording.ask_by_titles(history), self.wording.name(target)

    def _title_of(self, number: int) -> tuple[str, str]:
        item = self.items[number]
        return self.wording.ask_title_of(item), self._title(item)

    def _sid_of(self, number: int) -> tuple[str, str]:
        item = self.items[number]
        return self.wording.ask_sid_of(item), self.wording.name(item)

    def _items_in_text(self, row: int) -> tuple[str, str]:
        history, target = self._row(row)
        return self.start, self.wording.items_in_text([*history, target])

    def _item_in_text(self, number: int) -> tuple[str, str]:
        return self.start, self.wording.items_in_text([self.items[number]])

    def _conversation(self, number: int) -> tuple[str, str]:
        return self.conversations[number]

    def _row(self, row: int) -> tuple[list[int], int]:
        return list(self.rows.history[row]), self.rows.target[row]

    def _title(self, item: int) -> str:
        return self.policy.catalog.titles[item]


class NextItems(torch.utils.data.Dataset):
    """The next items of some rows, asked for without thinking; nothing is drawn.

    Raises:
        InputError: no row.
    """

    def __init__(self, policy: Policy, rows: Rows):
        if not len(rows):
            raise InputError(
                "the split has no validation row, so there is nothing to look at: leave validate_every out."
            )
        self.policy, self.rows, self.prompts = policy, rows, policy.prompts(rows.history, thinking=False)
        self.end = policy.tokenizer.eos_token if policy.chat else ""  # as stage 1 teaches it

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, list[int]]:
        answer = self.policy.wording.name(self.rows.target[index])
        return _encoded(self.policy, [(self.prompts[index], f"{answer}{self.end}")])[0]


def collate(examples: Sequence[dict[str, list[int]]], pad_id: int) -> dict[str, Tensor]:
    """Pad on the right to the longest example; labels of padding are ignored."""
    longest = max(len(example["input_ids"]) for example in examples)
    batch = {}
    for name, filler in (("input_ids", pad_id), ("labels", IGNORED)):
        batch[name] = torch.tensor([example[name] + [filler] * (longest - len(example[name])) for example in examples])
    lengths = torch.tensor([len(example["input_ids"]) for example in examples])
    batch["attention_mask"] = (torch.arange(longest) < lengths[:, None]).long()
    return batch


def _rows(split: Split, task: SFTTask, traces: Traces | None) -> Rows:
    """The training rows that a task has something to say of."""
    if not len(split.train):
        raise InputError(f"the split {split.name!r} has no training row: every training sequence has one item.")
    if task != "thinking":
        return split.train
    if traces is None:
        raise InputError("the task 'thinking' needs traces: those of the SID tree, or rationales of a teacher.")
    return traces.rows(split.train)


def _encoded(policy: Policy, texts: Sequence[tuple[str, str]]) -> list[dict[str, list[int]]]:
    """Prompts with their answers, which the loss sees; the two are encoded apart, as the decoder goes on from the
    prompt's own tokens."""
    parts = policy.tokenizer([part for pair in texts for part in pair], add_special_tokens=False)["input_ids"]
    return [
        {"input_ids": prompt + answer, "labels": [IGNORED] * len(prompt) + answer}
        for prompt, answer in zip(parts[::2], parts[1::2], strict=True)
    ]
