"""What a teacher says of why a history leads to its next item, cut into K thinking blocks.

A rationale is one text for a row, a history and its target.

    read_rationales    a teacher's file, JSON lines or CSV
    ask_teacher        a teacher behind an OpenAI-compatible URL, or on this machine, asked once for each row
    cut                one text into K parts by sentences, as the paper's fork does: alignment is by position alone
"""

import csv
import http.client
import json
import re
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from sapo.common.progress import progress_bar
from sapo.data.catalog import Catalog
from sapo.data.interactions import Rows
from sapo.errors import InputError
from sapo.policy.prompts import split_words

Key = tuple[tuple[int, ...], int]  # a history and its target
Teacher = Callable[[str], str]
THOUGHT = re.compile(r"<think>.*?</think>", re.DOTALL)
SENTENCE = re.compile(r"(?<=[.!?])\s+|\n+")
COLUMNS = ("history", "target", "rationale")


def cut(text: str, parts: int) -> list[str]:
    """Contiguous groups of sentences, as equal in number as can be, the first ones larger; the last ones may be empty.

    Sentences end after . ! ? and at line breaks.
    """
    sentences = [sentence.strip() for sentence in SENTENCE.split(text) if sentence.strip()]
    each, more = divmod(len(sentences), parts)
    ends = [each * part + min(part, more) for part in range(parts + 1)]
    return [" ".join(sentences[start:end]) for start, end in pairwise(ends)]


def read_rationales(path: str | Path, catalog: Catalog) -> dict[Key, str]:
    """A teacher's file: JSON objects, one a line, or CSV with a header; each has history, target and rationale.

    A history is item ids from old to new, separated by spaces or, in JSON, a list. Of several rationales of one row the
    last counts.

    Raises:
        InputError: no such file, no row, a row that lacks a field or names no item; the message names the line.
    """
    path = Path(path)
    if not path.is_file():
        raise InputError(f"{path} is not a file; it holds a teacher's rationales as JSON lines or CSV.")
    found: dict[Key, str] = {}
    for line, fields in _records(path):
        missing = [name for name in COLUMNS if not isinstance(fields.get(name), str | int | list)]
        if missing:
            raise InputError(f"{path}, line {line}: no {missing[0]!r}; a row has {', '.join(COLUMNS)}.")
        history = fields["history"]
        try:
            items = tuple(int(item) for item in (history if isinstance(history, list) else str(history).split()))
            target = int(fields["target"])
        except (TypeError, ValueError, OverflowError) as error:
            raise InputError(f"{path}, line {line}: history and target are item ids ({error}).") from error
        if not items or not all(0 <= item < catalog.num_items for item in (*items, target)):
            raise InputError(f"{path}, line {line}: items are 0 to {catalog.num_items - 1}, at least one in a history.")
        found[items, target] = str(fields["rationale"])
    if not found:
        raise InputError(f"{path} has no rationale.")
    return found


def teacher_prompt(catalog: Catalog, history: Sequence[int], target: int, longest: int = 10) -> str:
    """What a teacher is asked: why somebody with this history takes the target, in a step for each level of a SID."""
    taken = "\n".join(f"- {catalog.titles[item]}" for item in history[-longest:])
    category = f" ({catalog.categories[target]})" if catalog.categories[target] else ""
    return (
        f"A customer bought, from old to new:\n{taken}\n\nThe next purchase is: {catalog.titles[target]}{category}\n\n"
        f"Write the thoughts that lead from the history to it, in {catalog.num_levels} steps from general to special: "
        "first which kind of product comes next, then ever closer which one. One or two sentences a step, in the "
        "words of somebody who does not know the next purchase yet. Do not give its name."
    )


def ask_teacher(
    teacher: Teacher, catalog: Catalog, rows: Rows, path: str | Path, name: str = "", parallel: int = 8
) -> dict[Key, str]:
    """Ask for a rationale of each row.

    Answers are appended to a JSON-lines file as they come, and what stands there is not asked again, so a run that was
    stopped goes on. A question that fails does not stop the others, unless many fail one after the other.

    Args:
        name: of the teacher; it is kept with the answers, and the file is of one teacher.
        parallel: questions at a time.

    Raises:
        InputError: a question that failed, after all others; a file of another teacher, or one that is no JSON lines.
    """
    path = Path(path)
    if path.suffix == ".csv":
        raise InputError(f"{path}: answers are kept as JSON lines; name a file that ends in .jsonl.")
    known = _answered(path, catalog, name)
    keys = dict.fromkeys((tuple(history), target) for history, target in zip(rows.history, rows.target, strict=True))
    asked = [key for key in keys if key not in known]
    path.parent.mkdir(parents=True, exist_ok=True)
    failed: list[InputError] = []
    in_a_row = 0
    with path.open("a", encoding="utf-8") as file, ThreadPoolExecutor(parallel) as pool:
        futures = {pool.submit(teacher, teacher_prompt(catalog, *key)): key for key in asked}
        try:
            for future in progress_bar("teacher", as_completed(futures), total=len(asked)):
                history, target = key = futures[future]
                try:
                    answer = future.result()
                    if not answer.strip():
                        raise InputError("the teacher's answer is empty.")
                except InputError as error:
                    failed.append(error)
                    in_a_row += 1
                    if in_a_row >= 3 * parallel:
                        break
                    continue
                known[key], in_a_row = answer, 0
                row = {"history": list(history), "target": target, "rationale": answer, "teacher": name}
                file.write(json.dumps(row, ensure_ascii=False) + "\n")
                file.flush()
        finally:
            pool.shutdown(cancel_futures=True)
    if failed:
        raise InputError(f"{len(failed)} of {len(asked)} questions failed; the first: {failed[0]} Answers are kept.")
    return {key: known[key] for key in keys}


def _answered(path: Path, catalog: Catalog, name: str) -> dict[Key, str]:
    """What a file of answers holds; a last line that was torn goes."""
    if not path.is_file():
        return {}
    lines = path.read_bytes().splitlines(keepends=True)
    if lines and not lines[-1].endswith(b"\n"):
        try:
            json.loads(lines[-1])
        except (ValueError, RecursionError):
            lines.pop()
        else:
            lines[-1] += b"\n"
        path.write_bytes(b"".join(lines))
    if not any(line.strip() for line in lines):
        return {}
    others = {str(fields.get("teacher", "")) for _, fields in _records(path)} - {name}
    if others:
        raise InputError(f"{path} holds answers of {min(others)!r}, not of {name!r}: name another file.")
    return read_rationales(path, catalog)


@dataclass(frozen=True)
class OpenAITeacher:
    """A model behind an OpenAI-compatible URL (`/chat/completions` is added): vLLM, Ollama, OpenAI, and others.

    What a model thinks between <think> tags before it answers is no part of the answer.

    Args:
        attempts: of one question; the server may be busy or gone for a while.
        pause: seconds before the second attempt, twice as many before each further one.
    """

    url: str
    model: str
    key: str = ""
    temperature: float = 0.0
    max_tokens: int = 1000
    timeout: float = 120.0
    attempts: int = 5
    pause: float = 1.0

    def __call__(self, prompt: str) -> str:
        """The model's answer.

        Raises:
            InputError: the server refuses, is not there, or answers in another form.
        """
        body = {
            "model": self.model,
            "messages": [{"role": "user", "content": prompt}],
            "temperature": self.temperature,
            "max_tokens": self.max_tokens,
        }
        headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {self.key}"} if self.key else {})
        url = f"{self.url.rstrip('/')}/chat/completions"
        for attempt in range(self.attempts):
            if attempt:
                time.sleep(self.pause * 2 ** (attempt - 1))
            try:
                request = urllib.request.Request(url, json.dumps(body).encode(), headers)
                with urllib.request.urlopen(request, timeout=self.timeout) as answer:
                    choice = json.load(answer)["choices"][0]
                text = THOUGHT.sub("", choice["message"]["content"] or "").strip()
                if text and "<think>" not in text:
                    return text
                problem = f"no answer in {self.max_tokens} tokens (finish_reason {choice.get('finish_reason')!r})"
                break
            except urllib.error.HTTPError as error:
                problem = f"{error.code} {error.reason} {error.read(300).decode('utf-8', 'replace')}".strip()
                if error.code < 500 and error.code not in (408, 429):
                    break
            except (KeyError, IndexError, TypeError, ValueError) as error:
                problem = f"an answer of another form ({error!r})"
                break
            except (OSError, http.client.HTTPException) as error:
                problem = str(error) or type(error).__name__
        raise InputError(f"{url}: {problem}.")


def local_teacher(model: str | Path, max_new_tokens: int = 300) -> Teacher:
    """A language model on this machine, by name or folder, asked greedily; by its chat template where it has one.

    Raises:
        InputError: no such model.
    """
    from transformers import pipeline

    try:
        generate = pipeline("text-generation", model=str(model))
    except (OSError, ValueError) as error:
        raise InputError(f"{model}: no language model ({error}).") from error
    chat = generate.tokenizer.chat_template is not None

    def ask(prompt: str) -> str:
        question = [{"role": "user", "content": prompt}] if chat else prompt
        answer = generate(question, max_new_tokens=max_new_tokens, do_sample=False, return_full_text=False)
        return str(answer[0]["generated_text"]).strip()

    return ask


class RationaleTraces:
    """Thinking blocks of rationales: for a small policy, of each part the words it knows; whole sentences for others.

    Args:
        rationales: by history and target.
        num_steps: K.
        words_per_block: at most so many words of each part, the first ones.
        vocabulary: the words that may be used; parts stay as they are where None.
    """

    def __init__(
        self,
        rationales: Mapping[Key, str],
        num_steps: int,
        words_per_block: int = 0,
        vocabulary: Sequence[str] | None = None,
    ):
        self.rationales, self.num_steps, self.words_per_block = rationales, num_steps, words_per_block
        self._known = None if vocabulary is None else set(vocabulary)

    def rows(self, train: Rows) -> Rows:
        """The rows that the teacher has explained.

        Raises:
            InputError: none.
        """
        pairs = zip(train.history, train.target, strict=True)
        explained = [row for row, (items, target) in enumerate(pairs) if (tuple(items), target) in self.rationales]
        if not explained:
            raise InputError(
                f"none of {len(train)} training rows has a rationale: histories are whole, from a user's first item "
                "on, of the training part of the same split."
            )
        return train.take(explained)

    def of_row(self, history: Sequence[int], target: int) -> list[str]:
        """The K blocks for a row; a row without a rationale raises a KeyError."""
        parts = cut(self.rationales[tuple(history), target], self.num_steps)
        if self._known is None:
            return parts
        known = [[word for word in split_words(part) if word in self._known] for part in parts]
        return [" ".join(words[: self.words_per_block]) for words in known]


def _records(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Line number and fields of every row."""
    number = 0
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            if path.suffix == ".csv":
                reader = csv.DictReader(file)
                for fields in reader:
                    number = reader.line_num
                    yield number, dict(fields)
                return
            for number, line in enumerate(file, start=1):
                if line.strip():
                    fields = json.loads(line)
                    if not isinstance(fields, dict):
                        raise InputError(f"{path}, line {number}: no JSON object with {', '.join(COLUMNS)}.")
                    yield number, fields
    except UnicodeDecodeError as error:
        raise InputError(f"{path}, after line {number}: not UTF-8 ({error.reason}); save it as UTF-8.") from error
    except (json.JSONDecodeError, RecursionError, csv.Error) as error:
        raise InputError(f"{path}, line {number}: no {path.suffix.lstrip('.') or 'JSON'} ({error}).") from error
