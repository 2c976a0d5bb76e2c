"""A policy: a model with everything it takes to ask it for items. Saved and loaded as one folder."""

import json
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, Self

import torch
from jaxtyping import Float, Int
from torch import Tensor

from sapo.common.files import disk_errors, write_folder_atomically
from sapo.common.progress import progress_bar
from sapo.data.catalog import Catalog
from sapo.data.interactions import Split
from sapo.decoding.beam_search import Beams, search_beams
from sapo.decoding.layout import ReasoningLayout
from sapo.decoding.logprobs import completion_logps, end_ids
from sapo.decoding.prompt_cache import PromptCache
from sapo.decoding.sampling import Decoder, Rollouts, grouped_rollouts
from sapo.decoding.shared_prefix import PackedGroups, share_prompts
from sapo.errors import InputError
from sapo.policy.chat import ChatWording
from sapo.policy.contrast import CANDIDATES, contrast
from sapo.policy.prompts import THINK_END, THINK_START, CompactWording, Wording, sid_token_ids
from sapo.semantic_ids.trie import SidTrie

if TYPE_CHECKING:
    from transformers import BatchEncoding, PreTrainedModel, PreTrainedTokenizerFast

MANIFEST = "sapo.json"
MOST = 10**6  # of any number in it
SETTINGS = (
    *("split", "data_hash", "block_budget", "max_history", "min_block_tokens"),
    *("thinking", "num_blocks", "contrast", "chat"),
)  # of a policy, in its manifest


@dataclass(eq=False)
class Policy:
    """Model, tokenizer and catalogue, and the split that it was trained on.

    Args:
        split, data_hash: name and content hash of the training split; evaluating on another one raises.
        block_budget: most tokens of each thinking block.
        max_history: items of the history that a prompt shows, the most recent ones.
        thinking: whether it was trained to think before it names an item.
        num_blocks: how many blocks it thinks in; K where None.
        contrast: weight of contrastive inference (`sapo.policy.contrast`) when it is asked for items after thinking; 0
            searches as many candidates and leaves their order; None does not.
        chat: whether it is asked in sentences (`sapo.policy.chat`), as pretrained models are.

    Raises:
        InputError: a tokenizer that does not keep what a policy of sentences writes as it is.
    """

    model: "PreTrainedModel"
    tokenizer: "PreTrainedTokenizerFast"
    catalog: Catalog
    split: str
    data_hash: str
    block_budget: int
    max_history: int
    min_block_tokens: int = 0
    thinking: bool = True
    num_blocks: int | None = None
    contrast: float | None = None
    chat: bool = False

    def __post_init__(self) -> None:
        self.wording: Wording = (
            ChatWording(self.catalog, self.max_history, self.tokenizer)
            if self.chat
            else CompactWording(self.catalog, self.max_history)
        )
        self.layout = ReasoningLayout(
            self.catalog.num_levels,
            self.tokenizer.convert_tokens_to_ids(THINK_START),
            self.tokenizer.convert_tokens_to_ids(THINK_END),
            sid_token_ids(self.tokenizer, self.catalog.level_sizes),
            self.wording.sid_in_blocks,
            num_blocks=self.num_blocks if self.thinking else 0,
            separator_id=self.wording.separator_id,
        )
        self.trie = SidTrie(self.catalog.sids, self.catalog.level_sizes).to(self.model.device)
        share_prompts(self.model)

    def prompts(self, histories: Sequence[Sequence[int]], thinking: bool | None = None) -> list[str]:
        """The text that asks for the next item after each history.

        Args:
            thinking: whether thoughts are asked for too; as the policy was trained where None.

        Raises:
            InputError: an item that the catalogue does not have.
        """
        items = self.catalog.num_items
        for row, history in enumerate(histories):
            if history and not 0 <= min(history) <= max(history) < items:
                raise InputError(f"history {row} is {list(history)}; the items of this catalogue are 0..{items - 1}.")
        thinking = self.thinking if thinking is None else thinking
        return [self.wording.ask(history, thinking) for history in histories]

    def encode(self, texts: Sequence[str]) -> "BatchEncoding":
        """Token ids on the model's device, padded on the left; nothing is added to the texts."""
        batch = self.tokenizer(
            list(texts), return_tensors="pt", padding=True, padding_side="left", add_special_tokens=False
        )
        return batch.to(self.model.device)

    def sample(
        self, prompts: "BatchEncoding", group_size: int, generator: torch.Generator, temperature: float = 1.0
    ) -> Rollouts:
        """`group_size` completions of each of the encoded prompts, as the policy was trained to write them."""
        return grouped_rollouts(
            self.model,
            prompts["input_ids"],
            prompts["attention_mask"],
            self.layout,
            self.trie,
            group_size,
            block_budget=self.block_budget,
            min_block_tokens=self.min_block_tokens,
            temperature=temperature,
            generator=generator,
            pad_id=self.tokenizer.pad_token_id,
        )

    def logps(
        self,
        prompts: "BatchEncoding",
        rollouts: Rollouts,
        temperature: float = 1.0,
        sid_logps: Literal["trie", "full"] = "trie",
    ) -> Float[Tensor, "M T"]:
        """Log-probabilities of the sampled tokens of its rollouts, with a graph if gradients are on; 0 elsewhere."""
        ids, written = rollouts.completion_ids, rollouts.completion_mask
        packed = PackedGroups(prompts["input_ids"], prompts["attention_mask"].bool(), ids, written)
        return completion_logps(
            packed.logits(self.model, packed.predictor[rollouts.sampled]),
            ids,
            rollouts.sampled,
            self.layout,
            self.trie,
            pad_id=self.tokenizer.pad_token_id,
            eos_ids=end_ids(self.model),
            temperature=temperature,
            min_block_tokens=self.min_block_tokens,
            sid_logps=sid_logps,
        )

    def check_split(self, split: Split) -> None:
        """Refuse a split that this policy was not trained for: its test targets may be among the training targets.

        Raises:
            InputError: another split or other data.
        """
        if (self.split, self.data_hash) != (split.name, split.data_hash):
            raise InputError(
                f"this policy was trained on split {self.split!r} (data {self.data_hash[:12]}), not on {split.name!r} "
                f"(data {split.data_hash[:12]}): its training rows may hold these targets. Train one for this split."
            )

    def save(self, folder: str | Path) -> None:
        """Write weights, tokenizer and manifest; the folder appears whole or not at all."""
        manifest = {
            "catalog_hash": self.catalog.content_hash,
            "catalog": self.catalog.name,
            "num_levels": self.catalog.num_levels,
            **{name: getattr(self, name) for name in SETTINGS},
        }
        with write_folder_atomically(folder) as temporary:
            with disk_errors(folder):
                self.model.save_pretrained(temporary)
            self.tokenizer.save_pretrained(temporary)
            (temporary / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n")

    @classmethod
    def load(cls, folder: str | Path, catalog: Catalog, device: torch.device | str | None = None) -> Self:
        """Read a folder that `save` wrote; onto a GPU where there is one and `device` names no other.

        Raises:
            InputError: no such folder, not a policy's folder, or a policy of another catalogue.
        """
        from transformers import AutoModelForCausalLM, AutoTokenizer

        folder = Path(folder)
        if not (folder / MANIFEST).is_file():
            raise InputError(f"{folder} is no policy folder: it has no {MANIFEST}. Train one with `sapo run`.")
        manifest = _read_manifest(folder / MANIFEST)
        if manifest["num_levels"] != catalog.num_levels:
            raise InputError(
                f"{folder} holds a policy of K = {manifest['num_levels']} levels; the catalogue {catalog.name!r} has "
                f"{catalog.num_levels}."
            )
        if manifest["catalog_hash"] != catalog.content_hash:
            raise InputError(
                f"{folder} holds a policy of the catalogue {manifest['catalog']!r}; {catalog.name!r} has other items."
            )
        device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        safe: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}
        try:
            model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, use_safetensors=True, **safe)
            tokenizer = AutoTokenizer.from_pretrained(folder, padding_side="left", **safe)
        except Exception as error:  # of json, safetensors, tokenizers and transformers, each in its own way
            raise InputError(f"{folder} holds a policy that cannot be read: {error}") from error
        settings = {name: manifest[name] for name in SETTINGS if name in manifest}
        return cls(model.to(device), tokenizer, catalog, **settings)


def _read_manifest(path: Path) -> dict[str, Any]:
    """What a policy's folder says of it.

    Raises:
        InputError: not what `save` writes.
    """
    try:
        manifest = json.loads(path.read_text("utf-8"))
        numbers = {name: manifest[name] for name in ("num_levels", "block_budget", "max_history")}
        numbers |= {name: manifest.get(name, 0) for name in ("min_block_tokens", "num_blocks")}
        numbers["num_blocks"] = numbers["num_blocks"] or 0
        words = [manifest[name] for name in ("catalog_hash", "catalog", "split", "data_hash")]
        flags = [manifest.get(name, False) for name in ("thinking", "chat")]
        weight = manifest.get("contrast")
        counted = all(type(number) is int and 0 <= number < MOST for number in numbers.values())
        whole = (
            counted and all(isinstance(word, str) for word in words) and all(flag in (True, False) for flag in flags)
        )
        if not whole or not (weight is None or (type(weight) in (int, float) and math.isfinite(weight))):
            raise ValueError("a setting has no value that fits it")
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise InputError(f"{path} is damaged: {error}. Train the policy again with `sapo run`.") from None
    return manifest


class Recommendations(NamedTuple):
    """Best first. Places that do not exist have codes -1 and score -inf."""

    sids: Int[Tensor, "U k K"]
    scores: Float[Tensor, "U k"]
    thinking: list[str]  # the drafted blocks of each user, empty without thinking


def recommend(
    policy: Policy,
    histories: Sequence[Sequence[int]],
    num_beams: int = 10,
    k: int = 10,
    *,
    thinking: bool | None = None,
    normalize: Literal["full", "trie"] = "trie",
    batch_size: int = 128,
    progress: bool = False,
) -> Recommendations:
    """Think greedily, then search the catalogue by beams.

    Args:
        histories: item indices of each user, oldest first.
        num_beams, k: width of the search, and how many SIDs to return.
        thinking: False asks for the SID right after the prompt, as a model without stage 2 answers; None does as the
            policy was trained.
        normalize: see `constrained_beam_search`; "trie" is what RL trains.
    """
    if k > num_beams:
        raise InputError(f"k is {k}, but {num_beams} beams return at most {num_beams} items.")
    sids = torch.full((len(histories), k, policy.catalog.num_levels), -1)
    scores = torch.full((len(histories), k), float("-inf"))
    thoughts = [""] * len(histories)
    for batch in think(policy, histories, thinking=thinking, batch_size=batch_size, progress=progress):
        beams = search(policy, batch, num_beams, k, normalize)
        sids[batch.rows], scores[batch.rows] = beams.sids.cpu(), beams.scores.cpu()
        for row, thought in zip(batch.rows, batch.thinking, strict=True):
            thoughts[row] = thought
    return Recommendations(sids, scores, thoughts)


class Thoughts(NamedTuple):
    """Some of the histories with their thinking written: what is left to do is the SID."""

    rows: list[int]  # which histories
    cache: PromptCache  # prompts and blocks, read
    prompts: list[str]
    thinking: list[str]


def search(
    policy: Policy, thoughts: Thoughts, num_beams: int, k: int, normalize: Literal["full", "trie"] = "trie"
) -> Beams:
    """The k best SIDs after thoughts: those of a beam search, or, of a policy that contrasts, of its candidates.

    The candidates are at least `CANDIDATES`, scored as `normalize="trie"` does, and what comes back are no
    log-probabilities.
    """
    if policy.contrast is None or not any(thoughts.thinking):
        return search_beams(thoughts.cache, policy.trie, policy.layout.sid_token_ids, num_beams, k, normalize)
    width = max(num_beams, CANDIDATES)
    found = search_beams(thoughts.cache, policy.trie, policy.layout.sid_token_ids, width, width, "trie")
    found = contrast(policy, found, thoughts.prompts, thoughts.thinking, policy.contrast)
    return Beams(found.sids[:, :k], found.scores[:, :k])


@torch.no_grad()
def think(
    policy: Policy,
    histories: Sequence[Sequence[int]],
    *,
    thinking: bool | None = None,
    batch_size: int = 128,
    progress: bool = False,
    share: tuple[int, int] = (0, 1),
) -> Iterator[Thoughts]:
    """Write the blocks of every history greedily, batch by batch; histories of one length go together.

    The model is left in evaluation mode.

    Args:
        share: which batches, by number and count: (1, 4) is the second of every four. What is in a batch does not
            depend on it.

    Raises:
        InputError: thinking asked of a policy that does not.
    """
    thinking = policy.thinking if thinking is None else thinking
    if thinking and not policy.layout.blocks:
        raise InputError("this policy has not learnt to think: leave thinking out.")
    pad_id = policy.tokenizer.pad_token_id
    decoder = Decoder(policy.layout, pad_id, policy.block_budget, policy.min_block_tokens, greedy=True)
    texts = policy.prompts(histories, thinking)
    order = sorted(range(len(texts)), key=lambda row: len(histories[row]))
    starts: Iterable[int] = range(share[0] * batch_size, len(order), share[1] * batch_size)
    for start in progress_bar("recommend", starts) if progress else starts:
        policy.model.eval()
        rows = order[start : start + batch_size]
        batch = policy.encode([texts[row] for row in rows])
        cache, thoughts = PromptCache(policy.model, batch["input_ids"], batch["attention_mask"]), [""] * len(rows)
        if thinking:
            drafts = decoder.think(cache, 1, None)
            cache.extend_prompts(drafts.logits)
            thoughts = [
                policy.tokenizer.decode(ids[:length]) for ids, length in zip(drafts.ids, drafts.length, strict=True)
            ]
        yield Thoughts(rows, cache, [texts[row] for row in rows], thoughts)
