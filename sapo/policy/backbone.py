"""Small decoder-only models from a config. Qwen3, the family that the paper trains, at any size."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast, Qwen3ForCausalLM


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
