"""Checkpoints of the kinds that users bring, small and made on the spot: weights, a byte-level BPE tokenizer, a chat
template in each family's own form."""

from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    Qwen3Config,
    Qwen3ForCausalLM,
)

SIZE = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48, "head_dim": 8}
SPECIAL = {
    "qwen": {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"},
    "llama": {"bos_token": "<|begin_of_text|>", "eos_token": "<|eot_id|>"},  # no padding token, as Llama 3 has none
    "gemma": {"bos_token": "<bos>", "eos_token": "<end_of_turn>", "pad_token": "<pad>"},
}
TEMPLATES = {
    "qwen": "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}",
    "llama": "{{ bos_token }}{% for m in messages %}<|start_header_id|>{{ m.role }}<|end_header_id|>\n\n"
    "{{ m.content }}<|eot_id|>{% endfor %}"
    "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}",
    "gemma": "{{ bos_token }}{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('No system role') }}"
    "{% endif %}<start_of_turn>{{ m.role }}\n{{ m.content }}<end_of_turn>\n{% endfor %}"
    "{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}",
}
OTHER_SPECIAL = ["<|im_start|>", "<|start_header_id|>", "<|end_header_id|>", "<start_of_turn>"]


def bpe_tokenizer(kind: str, texts: list[str]) -> PreTrainedTokenizerFast:
    """Byte-level, trained on texts."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=[*SPECIAL[kind].values(), *OTHER_SPECIAL],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    core.train_from_iterator(texts, trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, **SPECIAL[kind])
    tokenizer.chat_template = TEMPLATES[kind]
    return tokenizer


def checkpoint(kind: str, texts: list[str], folder: Path, spare_rows: int = 24) -> Path:
    """A folder as on the hub; `spare_rows` of the vocabulary are no token's, as Qwen's are."""
    tokenizer = bpe_tokenizer(kind, texts)
    common = SIZE | {"vocab_size": len(tokenizer) + spare_rows, "max_position_embeddings": 512}
    common |= {"eos_token_id": tokenizer.eos_token_id, "bos_token_id": tokenizer.bos_token_id, "pad_token_id": None}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        if kind == "qwen":
            model = Qwen3ForCausalLM(Qwen3Config(**common, num_key_value_heads=2, tie_word_embeddings=True))
        elif kind == "llama":
            model = LlamaForCausalLM(LlamaConfig(**common, num_key_value_heads=1, tie_word_embeddings=False))
        else:
            layers = ["sliding_attention", "full_attention"]
            model = Gemma3ForCausalLM(
                Gemma3TextConfig(**common, num_key_value_heads=2, sliding_window=16, layer_types=layers)
            )
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
