"""What every benchmark runs on: a random model of a given size, prompts, a catalogue. Nothing is read or downloaded."""

import ctypes
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

from sapo.data.catalog import Catalog
from sapo.decoding.layout import ReasoningLayout
from sapo.policy.policy import Policy
from sapo.policy.prompts import build_tokenizer
from sapo.semantic_ids.trie import SidTrie

PAD, EOS, OPEN, CLOSE, FIRST_CODE = range(5)


@dataclass(frozen=True)
class Sizes:
    """How large everything is."""

    prompts: int = 32
    """Prompts an update."""
    group_size: int = 16
    """Completions a prompt."""
    prompt_tokens: int = 128
    """Tokens of a prompt."""
    new_tokens: int = 24
    """Words that a completion thinks. The delimiters of its blocks and its SID come on top."""
    steps: int = 1
    """Blocks that the words are divided into, and levels of the SID."""
    items: int = 3500
    """Items of the catalogue."""
    codes: int = 256
    """Codes of a level."""
    levels: int = 3
    """Levels of the catalogue that beams search."""
    vocabulary: int = 1200
    """Tokens that the model knows."""
    hidden: int = 64
    """Width of the model."""
    layers: int = 2
    """Its depth."""
    heads: int = 4
    """Its query heads."""
    key_heads: int = 4
    """Its key heads."""
    head: int = 16
    """Width of a head."""
    intermediate: int = 128
    """Width of its MLP."""


SMALL = Sizes()
# As large as Qwen3-0.6B.
LARGE = Sizes(
    prompts=8,
    prompt_tokens=256,
    new_tokens=128,
    vocabulary=151_936,
    hidden=1024,
    layers=28,
    heads=16,
    key_heads=8,
    head=128,
    intermediate=3072,
)


@dataclass
class World:
    """A model and what it is asked, on a device in a precision."""

    sizes: Sizes
    device: str = "cpu"
    dtype: torch.dtype = torch.float32

    @cached_property
    def model(self) -> Qwen3ForCausalLM:
        sizes = self.sizes
        torch.manual_seed(0)
        with torch.device(self.device):
            return Qwen3ForCausalLM(
                Qwen3Config(
                    vocab_size=sizes.vocabulary,
                    hidden_size=sizes.hidden,
                    num_hidden_layers=sizes.layers,
                    num_attention_heads=sizes.heads,
                    num_key_value_heads=sizes.key_heads,
                    head_dim=sizes.head,
                    intermediate_size=sizes.intermediate,
                    max_position_embeddings=4096,
                    tie_word_embeddings=True,
                    pad_token_id=PAD,
                    bos_token_id=None,
                    eos_token_id=EOS,
                )
            ).to(self.dtype)

    def folder(self, parent: Path) -> Path:
        """The model as the folder of a stage-2 policy, which trainers load."""
        self.model.save_pretrained(parent / "policy")
        return parent / "policy"

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerFast:
        from tokenizers import Tokenizer, models, pre_tokenizers

        core = Tokenizer(models.WordLevel({f"t{i}": i for i in range(self.sizes.vocabulary)}, unk_token=f"t{EOS}"))
        core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
        return PreTrainedTokenizerFast(
            tokenizer_object=core,
            pad_token=f"t{PAD}",
            eos_token=f"t{EOS}",
            unk_token=f"t{EOS}",
            padding_side="left",
        )

    def token_ids(self, levels: int) -> list[Tensor]:
        """Code -> token id of each level."""
        starts = range(FIRST_CODE, FIRST_CODE + levels * self.sizes.codes, self.sizes.codes)
        return [torch.arange(start, start + self.sizes.codes) for start in starts]

    def layout(self, steps: int) -> ReasoningLayout:
        return ReasoningLayout(steps, OPEN, CLOSE, self.token_ids(steps))

    def sids(self, items: int, levels: int) -> Tensor:
        return torch.randint(self.sizes.codes, (items, levels), generator=torch.Generator().manual_seed(1))

    def trie(self, items: int, levels: int) -> SidTrie:
        return SidTrie(self.sids(items, levels), (self.sizes.codes,) * levels).to(self.device)

    def prompts(self, rows: int, tokens: int) -> Tensor:
        """Random tokens, without delimiters or padding."""
        generator = torch.Generator().manual_seed(2)
        return torch.randint(FIRST_CODE, self.sizes.vocabulary, (rows, tokens), generator=generator).to(self.device)

    def policy(self, shown: int) -> Policy:
        """The same model with the tokens of a catalogue, asked after so many items at most.

        Its weights are random, so it thinks in words of no meaning, mostly to the end of each block's budget.
        """
        sizes = self.sizes
        titles = [f"item number {number}" for number in range(sizes.items)]
        catalog = Catalog("benchmark", self.sids(sizes.items, sizes.levels), titles)
        words = [f"word{chr(ord('a') + first)}{chr(ord('a') + second)}" for first in range(20) for second in range(20)]
        tokenizer = build_tokenizer(catalog, words)
        model = self.model
        model.resize_token_embeddings(max(len(tokenizer), sizes.vocabulary), mean_resizing=False)
        return Policy(model, tokenizer, catalog, "benchmark", "", sizes.new_tokens // sizes.levels, shown)

    def synchronize(self) -> None:
        if self.device != "cpu":
            torch.cuda.synchronize()


def keep_memory() -> None:
    """Let glibc keep what tensors free.

    It hands blocks over 32 MB back to the system, and fetching gigabytes anew in every call costs up to a fifth, which
    would be read as growth. MALLOC_TRIM_THRESHOLD_ and MALLOC_MMAP_MAX_ do the same for a training run.
    """
    allocator = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if allocator is not None:
        allocator(-4, 0)  # M_MMAP_MAX
        allocator(-1, 2**31 - 1)  # M_TRIM_THRESHOLD


def peak_bytes(world: World, run: Callable[[], Any]) -> int:
    """Most memory that tensors held during a call, beyond what they held before."""
    if world.device != "cpu":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        run()
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    held = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak
