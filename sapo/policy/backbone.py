"""What a policy starts from: a small Qwen3 of a config, or a pretrained model that learns the words for items."""

import hashlib
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from sapo.data.catalog import Catalog
from sapo.errors import InputError
from sapo.policy.prompts import PAD, THINK_END, THINK_START, sid_token

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase, PreTrainedTokenizerFast, Qwen3ForCausalLM


PAPER_BACKBONE = "Qwen/Qwen3-1.7B"  # of the paper and its fork
ENDS = 2**20  # bytes


@dataclass(frozen=True)
class BackboneConfig:
    """Size of a Qwen3 built from scratch."""

    hidden_size: int = 64
    """Width of the residual stream."""
    num_layers: int = 2
    """Transformer blocks."""
    num_heads: int = 4
    """Attention heads; keys and values have as many."""
    intermediate_size: int = 128
    """Width of the gated MLP."""
    max_positions: int = 512
    """Longest sequence, prompt and completion together."""
    dropout: float = 0.0
    """Attention dropout in stages 1 and 2. RL disables it: its log-probabilities must be reproducible."""


def build_backbone(config: BackboneConfig, tokenizer: "PreTrainedTokenizerFast", seed: int) -> "Qwen3ForCausalLM":
    """A randomly initialised model with the tokenizer's vocabulary; the same seed gives the same weights."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return Qwen3ForCausalLM(
            Qwen3Config(
                vocab_size=len(tokenizer),
                hidden_size=config.hidden_size,
                num_hidden_layers=config.num_layers,
                num_attention_heads=config.num_heads,
                num_key_value_heads=config.num_heads,
                head_dim=config.hidden_size // config.num_heads,
                intermediate_size=config.intermediate_size,
                max_position_embeddings=config.max_positions,
                attention_dropout=config.dropout,
                tie_word_embeddings=True,
                bos_token_id=tokenizer.bos_token_id,
                eos_token_id=tokenizer.eos_token_id,
                pad_token_id=tokenizer.pad_token_id,
            )
        )


@dataclass(frozen=True)
class Pretrained:
    """A language model that somebody has trained: Qwen3, Llama, Gemma, or another of transformers' own classes."""

    name: str
    """A folder, or a name on the Hugging Face hub, which is asked only if it is not in the cache."""
    revision: str | None = None
    """Commit, branch or tag on the hub; its main branch where None."""
    row_updates: int = 0
    """Updates of stage 1 that train the rows of the added tokens alone, before those that train everything."""
    lora_rank: int | None = None
    """Train low-rank adapters of this rank, merged when a stage ends, and the added rows; everything where None."""

    def __post_init__(self) -> None:
        if self.row_updates < 0 or (self.lora_rank is not None and self.lora_rank < 1):
            raise InputError(
                f"row_updates is {self.row_updates} and lora_rank {self.lora_rank}; at least 0, and at least 1 or None."
            )

    def check(self) -> None:
        """Without asking anybody.

        Raises:
            InputError: a name that is neither a folder with a model nor one of the hub's.
        """
        folder = Path(self.name)
        if folder.is_dir() and not (folder / "config.json").is_file():
            raise InputError(f"{self.name} has no config.json: a model's folder does.")
        if not folder.is_dir() and not re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", self.name):
            raise InputError(f"{self.name!r} is no folder, and names on the hub are OWNER/NAME.")

    @property
    def content(self) -> str:
        """What tells the weights of a folder from others: names, sizes, and both ends of its files."""
        digest = hashlib.sha256(f"{self.name}@{self.revision}".encode())
        folder = Path(self.name)
        if folder.is_dir():
            digest = hashlib.sha256()
            for path in sorted(path for path in folder.iterdir() if path.is_file()):
                size = path.stat().st_size
                with path.open("rb") as file:
                    start = file.read(ENDS)
                    file.seek(max(0, size - ENDS))
                    digest.update(f"{path.name} {size}".encode() + start + file.read(ENDS))
        return digest.hexdigest()


def load_pretrained(start: Pretrained) -> tuple["PreTrainedModel", "PreTrainedTokenizerBase"]:
    """A model in float32 and its tokenizer. Nothing of the checkpoint is run as code, and nothing of its generation
    settings is kept.

    Raises:
        InputError: no such model, one of a class that transformers does not have, weights that are not safetensors, or
            a tokenizer without an end token.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

    start.check()
    try:
        options = {"revision": start.revision, "trust_remote_code": False}
        tokenizer = AutoTokenizer.from_pretrained(start.name, padding_side="left", **options)
        model = AutoModelForCausalLM.from_pretrained(start.name, dtype=torch.float32, use_safetensors=True, **options)
    except (OSError, ValueError, KeyError) as error:
        raise InputError(f"{start.name!r} is no language model that can be loaded: {error}") from error
    if tokenizer.eos_token_id is None:
        raise InputError(f"the tokenizer of {start.name!r} has no end token (eos_token): answers end with one.")
    config = model.config.get_text_config()
    ends = config.eos_token_id if isinstance(config.eos_token_id, list) else [config.eos_token_id]
    config.eos_token_id = sorted({tokenizer.eos_token_id, *ends} - {None})
    model.generation_config = GenerationConfig(eos_token_id=config.eos_token_id)
    return model, tokenizer


@torch.no_grad()
def add_item_tokens(model: "PreTrainedModel", tokenizer: "PreTrainedTokenizerBase", catalog: Catalog) -> list[int]:
    """Teach a tokenizer the delimiters and SID tokens, and give a model a row for each: the mean of all its rows.

    They are ordinary tokens, which decoding shows. Rows that no token has are dropped.

    Returns:
        The ids of the tokens that were added.
    """
    from tokenizers import AddedToken

    known = len(tokenizer)
    codes = [sid_token(level, code) for level, size in enumerate(catalog.level_sizes) for code in range(size)]
    ordinary = [AddedToken(token, normalized=False, special=False) for token in (THINK_START, THINK_END, *codes)]
    tokenizer.add_tokens([token for token in ordinary if token.content not in tokenizer.get_vocab()])
    if tokenizer.pad_token is None:
        tokenizer.add_special_tokens({"pad_token": PAD})
    model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    tables = {module.weight for module in (model.get_input_embeddings(), model.get_output_embeddings())}
    for table in tables:
        table[known:] = table[:known].mean(0)
    model.config.get_text_config().pad_token_id = tokenizer.pad_token_id
    return list(range(known, len(tokenizer)))
