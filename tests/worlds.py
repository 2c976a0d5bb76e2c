"""Small things that tests make on the spot: random catalogues, a tiny Qwen3, a layout without a tokenizer."""

import torch
from torch import Tensor
from transformers import Qwen3Config, Qwen3ForCausalLM

from sapo.decoding.layout import ReasoningLayout
from sapo.semantic_ids.trie import SidTrie

PAD, EOS, OPEN, CLOSE, FIRST_SID = 0, 1, 2, 3, 4


def random_sids(num_items: int, level_sizes: tuple[int, ...], seed: int) -> Tensor:
    """Codes of random items; duplicates may occur."""
    generator = torch.Generator().manual_seed(seed)
    return torch.stack([torch.randint(size, (num_items,), generator=generator) for size in level_sizes], 1)


def layout_for(level_sizes: tuple[int, ...]) -> ReasoningLayout:
    """Token ids 0-3 are pad, EOS and the delimiters; then the codes level by level; then words."""
    ids, start = [], FIRST_SID
    for size in level_sizes:
        ids.append(torch.arange(start, start + size))
        start += size
    return ReasoningLayout(len(level_sizes), OPEN, CLOSE, ids)


def tiny_model(vocab_size: int, seed: int = 0, scale: float = 8.0, layers: int = 2) -> Qwen3ForCausalLM:
    """A random Qwen3 whose logits are spread out enough to prefer something."""
    torch.manual_seed(seed)
    model = Qwen3ForCausalLM(
        Qwen3Config(
            vocab_size=vocab_size,
            hidden_size=32,
            num_hidden_layers=layers,
            num_attention_heads=2,
            num_key_value_heads=2,
            head_dim=16,
            intermediate_size=48,
            max_position_embeddings=256,
            tie_word_embeddings=False,
            pad_token_id=PAD,
            bos_token_id=None,
            eos_token_id=EOS,
        )
    ).eval()
    with torch.no_grad():
        model.lm_head.weight.mul_(scale)
    return model


def random_prompts(rows: int, longest: int, vocab_size: int, seed: int) -> tuple[Tensor, Tensor]:
    """Prompts of random lengths, padded on the left."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(FIRST_SID, vocab_size, (rows, longest), generator=generator)
    lengths = torch.randint(1, longest + 1, (rows,), generator=generator)
    lengths[0] = longest
    mask = torch.arange(longest) >= longest - lengths[:, None]
    return ids.masked_fill(~mask, PAD), mask.long()


def trie_for(sids: Tensor, level_sizes: tuple[int, ...]) -> SidTrie:
    return SidTrie(sids, level_sizes)
