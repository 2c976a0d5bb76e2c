"""Prompts in sentences, for pretrained models: what is asked goes through the tokenizer's chat template.

    user       The user took these items, oldest first: <a_3><b_1><c_7>, <a_0><b_2><c_2>. Think in 3 steps, ...
    assistant  <think>
               It will be a tool.
               </think>
               <think>
               ...
               </think>
               <a_5><b_5><c_1>

Blocks and line breaks are those of the paper's fork (zhengzaiyi/SIDReasoner), the sentences ours. The answer is
appended to the prompt as text: templates of reasoning models drop or merge blocks of an assistant's turn.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from jinja2 import TemplateError

from sapo.data.catalog import Catalog
from sapo.errors import InputError
from sapo.policy.prompts import THINK_END, THINK_START, sid_text

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SYSTEM = (
    "You recommend items of a catalogue. Each item has a semantic ID, a few tokens that name it from coarse to fine."
)
LINE = "\n"
DATE = "1 January 2026"  # for templates that would write the day on which they are used


class ChatWording:
    """The prompts of pretrained models.

    Args:
        max_history: items that a prompt shows, the last ones of a history.
        tokenizer: with the delimiters and SID tokens of `add_item_tokens`.

    Raises:
        InputError: a tokenizer that does not keep blocks and SIDs as they are written.
    """

    glue, sid_in_blocks = "", True

    def __init__(self, catalog: Catalog, max_history: int, tokenizer: "PreTrainedTokenizerBase"):
        self.catalog, self.max_history, self.tokenizer = catalog, max_history, tokenizer
        line = self._ids(f"{THINK_END}{LINE}{THINK_START}")[1:-1]
        self.separator_id: int | None = line[0] if len(line) == 1 else None
        if self._ids(self.blocks(["", ""]) + self.name(0)) != self._expected():
            raise InputError(
                f"the tokenizer {type(tokenizer).__name__} does not keep {self.name(0)!r} and blocks as they are "
                f"written, so no decoder could write them: teach it with add_item_tokens."
            )

    def ask(self, history: Sequence[int], thinking: bool) -> str:
        """What comes next after SIDs, thought about or at once."""
        return self.turn(self.question(history, thinking))

    def question(self, history: Sequence[int], thinking: bool) -> str:
        """The same before the template."""
        items = ", ".join(map(self.name, history[-self.max_history :])) or "nothing yet"
        levels = self.catalog.num_levels
        then = (
            f"Think in {levels} steps, from what kind of item it is to which one, and then give its semantic ID."
            if thinking
            else "Give its semantic ID."
        )
        return f"The user took these items, oldest first: {items}. Which item comes next? {then}"

    def ask_by_titles(self, history: Sequence[int]) -> str:
        """What comes next after titles."""
        return self.turn(
            f"The user took these items, oldest first: {self._titles(history)}. Which item comes next? Give its "
            "semantic ID."
        )

    def ask_for_title(self, history: Sequence[int], by_titles: bool) -> str:
        """What the next item is called."""
        shown = history[-self.max_history :]
        items = self._titles(history) if by_titles else ", ".join(map(self.name, shown))
        return self.turn(f"The user took these items, oldest first: {items}. Which item comes next? Give its title.")

    def ask_title_of(self, item: int) -> str:
        """What an item is called."""
        return self.turn(f"Which item is {self.name(item)}? Give its title.")

    def ask_sid_of(self, item: int) -> str:
        """How an item is named."""
        return self.turn(f'Which item is "{self.catalog.titles[item]}"? Give its semantic ID.')

    def items_in_text(self, history: Sequence[int]) -> str:
        """Items with their names and titles, one after the other."""
        shown = history[-self.max_history - 1 :]
        return "; ".join(f"{self.name(item)} {self.catalog.titles[item]}".strip() for item in shown)

    def blocks(self, texts: Sequence[str]) -> str:
        """Texts on lines of their own, between delimiters; nothing between delimiters of an empty one."""
        after = "" if self.separator_id is None else LINE
        lines = (f"{LINE}{text}{LINE}" if text else LINE for text in texts)
        return "".join(f"{THINK_START}{text}{THINK_END}{after}" for text in lines)

    def name(self, item: int) -> str:
        """The K SID tokens of an item."""
        return sid_text(self.catalog, item, glue="")

    def turn(self, question: str) -> str:
        """A question as the template puts it, up to where the answer begins.

        Without a template it stands in a plain form. Templates without a system's turn get its sentence in front of the
        question. A block that the template opens itself is left to the decoder.
        """
        if self.tokenizer.chat_template is None:
            return f"{self.tokenizer.bos_token or ''}{SYSTEM}\n\nQuestion: {question}\n\nAnswer:\n"
        text = self._template(self.messages(question))
        return text[: text.rindex(THINK_START)] if text.rstrip().endswith(THINK_START) else text

    def reply_to(self, turns: Sequence[dict[str, str]]) -> str:
        """A conversation as the template puts it, up to where the next answer begins.

        Raises:
            InputError: turns that the template refuses in this order.
        """
        if self.tokenizer.chat_template is None:
            said = "\n\n".join(f"{turn['role'].capitalize()}: {turn['content']}" for turn in turns)
            return f"{self.tokenizer.bos_token or ''}{said}\n\nAnswer:\n"
        first, *others = turns
        try:
            return self._template(list(turns))
        except TemplateError as error:
            if first["role"] == "system" and others and others[0]["role"] == "user":  # as in `messages`
                content = f"{first['content']}\n\n{others[0]['content']}"
                return self.reply_to([{"role": "user", "content": content}, *others[1:]])
            roles = ", ".join(turn["role"] for turn in turns)
            raise InputError(f"the model's chat template refuses turns of {roles}: {error}") from error

    def messages(self, question: str) -> list[dict[str, str]]:
        """The turns that the template is given."""
        turns = [{"role": "system", "content": SYSTEM}, {"role": "user", "content": question}]
        try:
            self._template(turns)
        except TemplateError:  # how templates refuse a role
            return [{"role": "user", "content": f"{SYSTEM}\n\n{question}"}]
        return turns

    def _template(self, turns: list[dict[str, str]]) -> str:
        text = self.tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True, date_string=DATE)
        return str(text)

    def _titles(self, history: Sequence[int]) -> str:
        shown = history[-self.max_history :]
        return "; ".join(f'"{self.catalog.titles[item]}"' for item in shown)

    def _ids(self, text: str) -> list[int]:
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    def _expected(self) -> list[int]:
        """Ids of two blocks of nothing and the first item's name."""
        one, other = self.tokenizer.convert_tokens_to_ids([THINK_START, THINK_END])
        line = self._ids(f"{THINK_START}{LINE}{THINK_END}")[1:-1]
        after = [] if self.separator_id is None else [self.separator_id]
        sid = self.tokenizer.convert_tokens_to_ids(self.name(0).replace("><", "> <").split())
        return [*[one, *line, other, *after] * 2, *sid]
