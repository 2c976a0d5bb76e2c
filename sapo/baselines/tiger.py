"""TIGER (arXiv 2305.05065): an encoder-decoder that reads a history as SIDs and writes the next item's SID.

The input is the user, hashed into one of some tokens, then the codes of the history's items from old to new; every code
of every level is a word of its own. Every item of a training sequence is a target after the items before it. Items that
share a SID are told apart by one code more, which counts them; beams then search the catalogue's SIDs, so that what
comes out is a ranking of items.

The network is transformers' T5, of the paper's size unless told otherwise. The authors publish no code; learning rate
and length of training here are the loop's.

LETTER-TIGER (arXiv 2405.07314) is the same model of SIDs that LETTER makes, trained at a temperature below 1, which
weighs likely wrong codes more; as in its authors' code, the search does without it.
"""

import zlib
from collections.abc import Sequence
from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import cross_entropy, pad
from torch.nn.utils.rnn import pad_sequence
from transformers import DynamicCache, EncoderDecoderCache, T5Config, T5ForConditionalGeneration

from sapo.baselines.fitting import FitConfig, Recommender
from sapo.data.interactions import Split
from sapo.decoding.beam_search import constrained_beam_search
from sapo.errors import InputError
from sapo.semantic_ids.collisions import collision_rate, extra_token
from sapo.semantic_ids.trie import SidTrie

KeysValues = list[tuple[Float[Tensor, "B H P d"], Float[Tensor, "B H P d"]]]  # of every layer


class Tiger(Recommender):
    """A Recommender.

    Args:
        sids: codes of every item.
        max_history: items that are read.
        size, layers, heads, head_size, feed_forward: of the encoder and of the decoder each.
        user_tokens: how many users are hashed to; 0 leaves users out.
        beams: of the search, at least k.
        temperature: the logits of the loss are divided by it.
        rivals: what a code competes with, in the loss and in the search: "all" words, or the codes that may stand there
            ("trie"), so that nothing has to be learnt of which SIDs there are.
    """

    ranked_together = 16  # their beams fit the cache of a processor
    codes: Int[Tensor, "N K"]
    tokens: Int[Tensor, "N K"]  # words of the codes

    def __init__(
        self,
        sids: Int[Tensor, "N K"],
        max_history: int = 20,
        size: int = 128,
        layers: int = 4,
        heads: int = 6,
        head_size: int = 64,
        feed_forward: int = 1024,
        dropout: float = 0.1,
        user_tokens: int = 2000,
        beams: int = 20,
        temperature: float = 1.0,
        rivals: Literal["all", "trie"] = "all",
    ):
        if rivals not in ("all", "trie"):
            raise InputError(f"rivals is {rivals!r}; all or trie fits.")
        super().__init__(len(sids), max_history)
        self.reach = min(beams, len(sids))
        self.user_tokens, self.beams, self.temperature, self.rivals = user_tokens, beams, temperature, rivals
        codes = extra_token(sids) if collision_rate(sids) else sids
        sizes = (codes.amax(0) + 1).tolist()
        self.trie = SidTrie(codes, sizes)
        starts = 1 + torch.tensor([sum(sizes[:level]) for level in range(len(sizes))])  # 0 pads, and begins
        self.level_tokens = [start + torch.arange(size) for start, size in zip(starts, sizes, strict=True)]
        self.register_buffer("codes", codes, persistent=False)
        self.register_buffer("tokens", codes + starts, persistent=False)
        self._item = {tuple(sid): item for item, sid in enumerate(codes.tolist())}
        self.network = T5ForConditionalGeneration(
            T5Config(
                vocab_size=1 + sum(sizes) + user_tokens,
                d_model=size,
                d_kv=head_size,
                d_ff=feed_forward,
                num_layers=layers,
                num_heads=heads,
                dropout_rate=dropout,
                pad_token_id=0,
                decoder_start_token_id=0,
                eos_token_id=None,
            )
        )

    def loss(self, split: Split, examples: list[int], config: FitConfig) -> Float[Tensor, ""]:
        """Cross-entropy of the codes of the targets."""
        rows = split.train.take(examples)
        prompts = self.prompts(rows.history, rows.user)
        targets = self.tokens[rows.target]
        logits = self._logits(self._encode(prompts), prompts, targets[:, :-1]).float() / self.temperature
        if self.rivals == "trie":
            codes, may_stand = self.codes[rows.target], torch.zeros_like(logits, dtype=torch.bool)
            trie = self.trie.to(codes.device)
            for level, words in enumerate(self.level_tokens):
                may_stand[:, level, words] = trie.allowed(codes[:, :level])
            logits = logits.masked_fill(~may_stand, float("-inf"))
        return cross_entropy(logits.flatten(0, 1), targets.flatten())

    def prompts(self, histories: Sequence[Sequence[int]], users: Sequence[str]) -> Int[Tensor, "B P"]:
        """What is read: the user's word and the codes of the last items, padded with 0 at the end."""
        items = [torch.tensor(history[-self.max_history :]) for history in histories]
        padded = pad_sequence(items, batch_first=True, padding_value=self.num_items).to(self.tokens.device)
        words = pad(self.tokens, (0, 0, 0, 1))[padded].flatten(1)  # the row below the last item's pads
        if not self.user_tokens:
            return words
        first = self.network.config.vocab_size - self.user_tokens
        hashed = [[first + zlib.crc32(user.encode()) % self.user_tokens] for user in users]  # the same everywhere
        return torch.cat([words.new_tensor(hashed), words], 1)

    def best(self, histories: Sequence[Sequence[int]], users: Sequence[str], k: int) -> Int[Tensor, "B k"]:
        """The items of the k best beams."""
        prompts = self.prompts(histories, users)
        read = self._encode(prompts)
        keys_of_prompts = self._keys(read)
        beams = constrained_beam_search(
            None,
            prompts,
            (prompts > 0).long(),
            self.trie,
            self.level_tokens,
            max(k, self.beams),
            num_return=k,
            normalize="trie" if self.rivals == "trie" else "full",
            step_fn=lambda rows, written: self._logits(
                read[rows], prompts[rows], written, [(keys[rows], values[rows]) for keys, values in keys_of_prompts]
            )[:, -1],
        )
        return torch.tensor([[self._item[tuple(sid)] for sid in of_row] for of_row in beams.sids.tolist()])

    def _encode(self, prompts: Int[Tensor, "B P"]) -> Float[Tensor, "B P D"]:
        return self.network.encoder(input_ids=prompts, attention_mask=(prompts > 0).long()).last_hidden_state

    def _keys(self, read: Float[Tensor, "B P D"]) -> KeysValues:
        """What every layer of the decoder looks at of what was read. All beams of a prompt share it; to make it again
        for each of them is most of the work of a search."""
        attentions = [block.layer[1].EncDecAttention for block in self.network.decoder.block]
        heads = (self.network.config.num_heads, self.network.config.d_kv)
        return [
            (layer.k(read).unflatten(-1, heads).transpose(1, 2), layer.v(read).unflatten(-1, heads).transpose(1, 2))
            for layer in attentions
        ]

    def _logits(
        self,
        read: Float[Tensor, "B P D"],
        prompts: Int[Tensor, "B P"],
        written: Int[Tensor, "B d"],
        keys: KeysValues | None = None,
    ) -> Float[Tensor, "B d+1 V"]:
        """Of each word that could follow the first 0, 1, ..., d that are written; `keys`, where they are known."""
        begin = written.new_zeros(len(written), 1)
        return self.network(
            encoder_outputs=(read,),
            attention_mask=(prompts > 0).long(),
            decoder_input_ids=torch.cat([begin, written], 1),
            past_key_values=None if keys is None else EncoderDecoderCache(DynamicCache(), DynamicCache(keys)),
            use_cache=False,
        ).logits
