"""From texts to semantic IDs: vectors, codes, collisions; saved with the catalogue, for the SIDs of later items."""

import json
import math
import re
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Protocol, Self

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from sapo.common.files import write_atomically
from sapo.data.catalog import Catalog, load_texts
from sapo.data.interactions import Split
from sapo.errors import InputError
from sapo.semantic_ids.collisions import collision_rate, extra_token, reassign, share_out
from sapo.semantic_ids.config import TokenizerConfig
from sapo.semantic_ids.letter import Letter
from sapo.semantic_ids.residual_kmeans import ResidualKMeans
from sapo.semantic_ids.rqvae import RQVAE
from sapo.semantic_ids.vectors import TextVectors, collaborative_vectors, item_texts, sentence_vectors


class Quantizer(Protocol):
    """What every method can do: codes of the vectors it learns from, and of others."""

    level_sizes: tuple[int, ...]

    def fit(self, vectors: Float[Tensor, "N D"], progress: bool = False) -> Int[Tensor, "N K"]: ...
    def encode(self, vectors: Float[Tensor, "N D"]) -> Int[Tensor, "N K"]: ...
    def reconstruct(self, codes: Int[Tensor, "N K"]) -> Float[Tensor, "N D"]: ...
    def last_costs(self, vectors: Float[Tensor, "N D"], codes: Int[Tensor, "N K"]) -> Float[Tensor, "N C"]: ...
    def state(self) -> dict[str, Tensor]: ...
    def restored(self, state: dict[str, Tensor]) -> Any: ...


class ItemTokenizer:
    """Learns SIDs of a catalogue's texts, and gives them to other texts.

    Attributes:
        codes: (N, K) of the items that were fitted, collisions handled.
        vectors: (N, D) of their texts.
        raw_codes: (N, K) before collisions were handled.
        learnt_from: name and data hash of the split whose training sequences were looked at; none of texts alone.
    """

    codes: Int[Tensor, "N K"]
    raw_codes: Int[Tensor, "N K"]
    vectors: Float[Tensor, "N D"]

    def __init__(self, config: TokenizerConfig):
        self.config = config
        self.learnt_from: list[str] | None = None

    def fit(self, texts: Sequence[str], split: Split | None = None, progress: bool = False) -> Int[Tensor, "N K"]:
        """Codes of all items.

        Args:
            texts: one an item, as `item_texts` gives them.
            split: from whose training sequences "letter" learns who takes what together.

        Raises:
            InputError: fewer items than codes, or more than SIDs if none may be shared; texts without words; "letter"
                without a split.
        """
        config = self.config
        self._text = TextVectors(seed=config.seed) if config.vectors == "tfidf" else None
        self.vectors = torch.from_numpy(
            self._text.fit(texts) if self._text else sentence_vectors(texts, config.vectors)
        )
        levels = config.levels or default_levels(len(texts))
        if config.collisions in ("reassign", "share_out") and math.prod(levels) < len(texts):
            raise InputError(
                f"levels {levels} make {math.prod(levels)} SIDs for {len(texts)} items, so that items must share some: "
                "use more codes or levels, or collisions extra_token or leave."
            )
        self.quantizer = quantizer(config, levels)
        if isinstance(self.quantizer, Letter):
            if split is None:
                raise InputError("letter learns from who takes what together: give a split.")
            together = collaborative_vectors(split.sequences, len(texts), self.quantizer.size, seed=config.seed)
            self.quantizer.collaborative = torch.from_numpy(together)
            self.learnt_from = [split.name, split.data_hash]
        self.raw_codes = self.quantizer.fit(self.vectors, progress)
        self.codes = self.raw_codes
        if config.collisions == "extra_token":
            self.codes = extra_token(self.raw_codes)
        elif config.collisions != "leave":
            move = reassign if config.collisions == "reassign" else share_out
            self.codes = move(self.raw_codes, self.quantizer.last_costs(self.vectors, self.raw_codes))
        return self.codes

    def losses(self) -> dict[str, float]:
        """What the method itself keeps apart of the items that were fitted: collisions_before (any was handled), and
        reconstruction_error (squared, of the codes before, as a share of the vectors' variance)."""
        missed = (self.vectors - self.quantizer.reconstruct(self.raw_codes)).pow(2).sum()
        variance = (self.vectors - self.vectors.mean(0)).pow(2).sum()
        return {
            "collisions_before": collision_rate(self.raw_codes),
            "reconstruction_error": float(missed / variance),
        }

    def encode(self, texts: Sequence[str]) -> Int[Tensor, "N K"]:
        """SIDs of other items, without fitting again. They may share SIDs, with one another and with fitted items; an
        extra token is 0.

        Args:
            texts: one an item, of title, brand, category and description as `item_texts` joins them. A text without a
                word that was fitted gets a SID that says nothing of it.

        Raises:
            InputError: one text that is not in a list.
        """
        if isinstance(texts, str):
            raise InputError("texts is one text; give a list of texts, one an item.")
        vectors = self._text.encode(texts) if self._text else sentence_vectors(texts, self.config.vectors)
        codes = self.quantizer.encode(torch.from_numpy(vectors))
        if self.config.collisions == "extra_token":
            codes = torch.cat([codes, torch.zeros_like(codes[:, :1])], 1)
        return codes

    def save(self, path: str | Path) -> None:
        """Write one safetensors file."""
        from safetensors.torch import save_file

        tensors = {f"quantizer.{name}": tensor.contiguous() for name, tensor in self.quantizer.state().items()}
        words: list[str] = []
        if self._text:
            arrays, words = self._text.state()
            tensors |= {f"text.{name}": torch.from_numpy(np.ascontiguousarray(array)) for name, array in arrays.items()}
        config = {**asdict(self.config), "levels": list(self.quantizer.level_sizes)}
        with write_atomically(path) as temporary:
            notes = {"config": config, "words": words, "learnt_from": self.learnt_from}
            save_file(tensors, temporary, {name: json.dumps(note) for name, note in notes.items()})

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Read what `save` wrote; `encode` works, `codes` and `vectors` are not there.

        Raises:
            InputError: no such file, or another kind of file.
        """
        from safetensors.torch import load_file

        notes = _notes(path)
        try:
            fields = notes["config"]
            config = TokenizerConfig(**fields | {"levels": tuple(fields["levels"])})
        except (KeyError, TypeError) as error:
            raise InputError(f"{path} is no tokenizer ({error!r}).") from error
        tensors = load_file(path)
        part = lambda of: {name.removeprefix(of): x for name, x in tensors.items() if name.startswith(of)}  # noqa: E731
        tokenizer = cls(config)
        tokenizer.learnt_from = notes["learnt_from"]
        arrays = {name: tensor.numpy() for name, tensor in part("text.").items()}
        tokenizer._text = TextVectors().restored(arrays, notes["words"]) if arrays else None
        tokenizer.quantizer = quantizer(config, tuple(fields["levels"])).restored(part("quantizer."))
        return tokenizer


def quantizer(config: TokenizerConfig, levels: tuple[int, ...]) -> Quantizer:
    """The method of a config, not fitted."""
    if config.method in ("rkmeans", "rkmeans_balanced"):
        return ResidualKMeans(levels, balanced=config.method == "rkmeans_balanced", seed=config.seed)
    if config.method == "letter":
        return Letter(levels, epochs=config.epochs, seed=config.seed)
    epsilon = 0.003 if config.method == "lcrec" else 0.0
    return RQVAE(levels, epochs=config.epochs, sinkhorn_epsilon=epsilon, seed=config.seed)


def default_levels(num_items: int) -> tuple[int, ...]:
    """Three levels of 256 codes; of the largest power of two that gives each code four items, where there are fewer."""
    return (min(256, 2 ** max(1, int(np.log2(max(2, num_items // 4))))),) * 3


def refuse_another_split(folder: str | Path, sids: str, split: Split) -> None:
    """SIDs that were learnt from who takes what together know of training sequences, and of no others.

    Raises:
        InputError: a tokenizer of that name in the folder has looked at those of another split.
    """
    saved = Path(folder) / f"{sids}.safetensors"
    learnt_from = _notes(saved).get("learnt_from") if saved.is_file() else None
    if learnt_from not in (None, [split.name, split.data_hash]):
        raise InputError(
            f"{saved} has learnt from the training sequences of {learnt_from[0]}, among which are targets of this "
            f"{split.name}: use that split, or other SIDs (`sapo data tokenize --split {split.name} --name ...`)."
        )


def _notes(path: str | Path) -> dict[str, Any]:
    """What stands beside the tensors of a file.

    Raises:
        InputError: no such file, or another kind of file.
    """
    from safetensors import SafetensorError, safe_open

    if not Path(path).is_file():
        raise InputError(f"{path} is not a file; `sapo data tokenize` writes one beside the SIDs.")
    try:
        with safe_open(path, "pt") as file:
            return {name: json.loads(note) for name, note in (file.metadata() or {}).items()}
    except (SafetensorError, ValueError) as error:
        raise InputError(f"{path} is no tokenizer ({error}).") from error


def tokenize_folder(
    folder: str | Path, name: str, config: TokenizerConfig, split: Split | None = None, replace: bool = False
) -> tuple[Catalog, ItemTokenizer]:
    """Learn SIDs of a data folder's items; writes `<name>.tsv.gz` and `<name>.safetensors` there.

    Args:
        replace: whether SIDs of this name that a tokenizer of ours made may go.

    Raises:
        InputError: as `ItemTokenizer.fit`; a name that is none of a file; SIDs that have it already.
    """
    if not re.fullmatch(r"\w[\w.-]*", name):
        raise InputError(f"{name!r} is no name of SIDs; letters, digits, - and _ make one.")
    saved = Path(folder) / f"{name}.safetensors"
    if any(Path(folder).glob(f"{name}.tsv*")):
        if not saved.exists():
            raise InputError(f"{folder} has {name} that no tokenizer of ours made; give ours another name (--name).")
        if not replace:
            raise InputError(
                f"{folder} has {name} already, of {ItemTokenizer.load(saved).config.method}: policies may have been "
                "trained on them. Give other ones another name (--name), or say --replace."
            )
    texts, tokenizer = load_texts(folder), ItemTokenizer(config)
    sids = tokenizer.fit(item_texts(texts), split, progress=True)
    catalog = Catalog(Path(folder).resolve().name, sids, item_ids=list(range(len(sids))), **texts)
    tokenizer.save(saved)  # first: SIDs without it would pass for somebody else's
    catalog.save_sids(folder, name)
    return catalog, tokenizer
