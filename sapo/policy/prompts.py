"""How a policy is spoken to and answers. Compact: an item is its K SID tokens, a history is its items, oldest first.

    <bos> a_3 b_1 c_7  a_0 b_2 c_2                                   the prompt
    <think> words </think> ... <think> words </think> a_5 b_5 c_1    a completion that thinks
    a_5 b_5 c_1                                                      one that does not

What the model does next is decided by the first token of the completion, so a prompt needs no instruction. Pretrained
models are asked in sentences instead (`sapo.policy.chat`).
"""

import re
from collections import Counter
from collections.abc import Collection, Iterable, Sequence
from itertools import islice
from typing import TYPE_CHECKING, Protocol

import torch
from jaxtyping import Int
from torch import Tensor

from sapo.data.catalog import Catalog

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

PAD, BOS, EOS, UNK = "<pad>", "<bos>", "<eos>", "<unk>"
THINK_START, THINK_END = "<think>", "</think>"
TITLE_OF, ITEM_OF = "<title>", "<item>"  # stage 1: SID <title> words, and <item> words SID
TITLE_WORDS = 8

_WORD = re.compile(r"[^\W\d_]{2,}")


class Wording(Protocol):
    """How a policy is spoken to."""

    @property
    def glue(self) -> str:
        """What stands between a prompt and the completion, and between thoughts and SID."""

    @property
    def separator_id(self) -> int | None:
        """The token after every block, if there is one."""

    @property
    def sid_in_blocks(self) -> bool:
        """Whether a block may mention SIDs."""

    def ask(self, history: Sequence[int], thinking: bool) -> str:
        """The prompt for the next item after a history, and for thoughts before it."""

    def blocks(self, texts: Sequence[str]) -> str:
        """Thinking blocks."""

    def name(self, item: int) -> str:
        """The K SID tokens of an item."""


class CompactWording:
    """The prompts of small models.

    Args:
        max_history: items that a prompt shows, the last ones of a history.
    """

    glue, separator_id, sid_in_blocks = " ", None, False

    def __init__(self, catalog: Catalog, max_history: int):
        self.catalog, self.max_history = catalog, max_history

    def ask(self, history: Sequence[int], thinking: bool) -> str:
        """Items alone; the same with thoughts and without."""
        return " ".join([BOS, *map(self.name, history[-self.max_history :])])

    def blocks(self, texts: Sequence[str]) -> str:
        """Words between delimiters."""
        return " ".join(" ".join([THINK_START, *text.split(), THINK_END]) for text in texts)

    def name(self, item: int) -> str:
        """The K SID tokens of an item."""
        return sid_text(self.catalog, item)


def split_words(text: str) -> list[str]:
    """Lower-case words of two letters or more, in order."""
    return _WORD.findall(text.lower())


def title_words(title: str, vocabulary: Collection[str]) -> list[str]:
    """What a prompt says of a title: its first words that a tokenizer knows."""
    return [*islice((word for word in split_words(title) if word in vocabulary), TITLE_WORDS)]


def sid_token(level: int, code: int) -> str:
    """The token that names a code: level 0 is `<a_...>`, level 1 `<b_...>`."""
    return f"<{chr(ord('a') + level)}_{code}>"


def build_tokenizer(catalog: Catalog, words: Sequence[str]) -> "PreTrainedTokenizerFast":
    """A word-level tokenizer: SID tokens, delimiters, and the words that traces and titles use.

    Delimiters and SID tokens are ordinary tokens, so decoding shows them.
    """
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    codes = [sid_token(level, code) for level, size in enumerate(catalog.level_sizes) for code in range(size)]
    vocabulary = [PAD, BOS, EOS, UNK, THINK_START, THINK_END, TITLE_OF, ITEM_OF, *codes, *sorted(set(words))]
    core = Tokenizer(models.WordLevel({token: index for index, token in enumerate(vocabulary)}, unk_token=UNK))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token=PAD,
        bos_token=BOS,
        eos_token=EOS,
        unk_token=UNK,
        padding_side="left",
        clean_up_tokenization_spaces=False,
    )


def sid_token_ids(tokenizer: "PreTrainedTokenizerFast", level_sizes: Sequence[int]) -> list[Int[Tensor, "V"]]:
    """For each level: code -> token id."""
    return [
        torch.tensor(tokenizer.convert_tokens_to_ids([sid_token(level, code) for code in range(size)]))
        for level, size in enumerate(level_sizes)
    ]


def frequent_words(catalog: Catalog, limit: int) -> list[str]:
    """The `limit` words that most items have in title or category, but at least two; ties in alphabetical order."""
    return common_words(map(" ".join, zip(catalog.titles, catalog.categories, strict=True)), limit)


def common_words(texts: Iterable[str], limit: int) -> list[str]:
    """The `limit` words that most texts have, but at least two; ties in alphabetical order."""
    counts = Counter(word for text in texts for word in set(split_words(text)))
    common = [word for word, count in counts.items() if count > 1]
    return sorted(common, key=lambda word: (-counts[word], word))[:limit]


def sid_text(catalog: Catalog, item: int, glue: str = " ") -> str:
    """The K tokens of an item."""
    return glue.join(sid_token(level, code) for level, code in enumerate(catalog.sids[item].tolist()))
