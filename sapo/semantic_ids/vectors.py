"""Vectors of items: what they say (text) and who takes them together (collaborative).

Text vectors are TF-IDF and truncated SVD by default: offline, the same every time, seconds. A sentence encoder is an
extra.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Self

import numpy as np
from jaxtyping import Float32
from numpy import ndarray

from sapo.errors import InputError

if TYPE_CHECKING:
    from sklearn.feature_extraction.text import TfidfVectorizer

Vectors = Float32[ndarray, "N D"]

_ROUNDING = 1e-6  # of numbers of the order of 1


def item_texts(texts: Mapping[str, Sequence[str]]) -> list[str]:
    """Title, brand, category and description of every item as one text, of `Catalog.texts` or `load_texts`."""
    columns = (texts[attribute] for attribute in ("titles", "brands", "categories", "descriptions"))
    return [" ".join(filter(None, of_item)) for of_item in zip(*columns, strict=True)]


@dataclass
class TextVectors:
    """TF-IDF of words and pairs of words, reduced by truncated SVD, rows of length 1; 0 is a text without known
    words, or with words that no axis shows.

    Args:
        size: numbers of a vector; fewer where the texts have fewer independent words.
        seed: of the randomised SVD.
    """

    size: int = 256
    seed: int = 0
    _words: "TfidfVectorizer | None" = field(default=None, repr=False)
    _axes: ndarray | None = field(default=None, repr=False)  # (D, words)

    def fit(self, texts: Sequence[str]) -> Vectors:
        """Learn words and axes.

        Raises:
            InputError: no two texts share a word.
        """
        from sklearn.decomposition import TruncatedSVD

        self._words = _tfidf(min_df=min(2, len(texts)))
        try:
            weights = self._words.fit_transform(texts)
        except ValueError as error:
            raise InputError("no two items share a word; text vectors need texts.") from error
        size = min(self.size, *(length - 1 for length in weights.shape))
        if size < 1:
            raise InputError(f"{weights.shape[0]} items with {weights.shape[1]} words are too few for text vectors.")
        svd = TruncatedSVD(size, n_iter=7, random_state=self.seed).fit(weights)
        # Axes beyond the rank are any directions at all: nothing of these texts, but something of others.
        self._axes = svd.components_[svd.singular_values_ > _ROUNDING * svd.singular_values_.max()]
        return self.encode(texts)

    def encode(self, texts: Sequence[str]) -> Vectors:
        """Vectors of any texts; words that were not fitted count for nothing."""
        assert self._words is not None
        assert self._axes is not None
        return _unit(self._words.transform(texts) @ self._axes.T)

    def state(self) -> tuple[dict[str, ndarray], list[str]]:
        """What `restored` needs: arrays and words."""
        assert self._words is not None
        assert self._axes is not None
        return {"idf": self._words.idf_, "axes": self._axes}, self._words.get_feature_names_out().tolist()

    def restored(self, arrays: dict[str, ndarray], words: list[str]) -> Self:
        """Itself, with what was learnt before."""
        self._words = _tfidf(vocabulary=words)
        self._words.idf_ = arrays["idf"]
        self._axes = arrays["axes"]
        return self


def sentence_vectors(texts: Sequence[str], model: str | Path, batch_size: int = 64) -> Vectors:
    """Vectors of a sentence-transformers model, given by name or folder; rows of length 1.

    Raises:
        InputError: the package is not there, or no such model.
    """
    try:
        from sentence_transformers import SentenceTransformer
    except ImportError as error:
        raise InputError("sentence vectors need an extra: pip install 'sapo[sentences]'.") from error
    try:
        encoder = SentenceTransformer(str(model))
    except (OSError, ValueError) as error:
        raise InputError(f"{model}: no sentence-transformers model ({error}).") from error
    return _unit(encoder.encode(list(texts), batch_size=batch_size, show_progress_bar=False))


def collaborative_vectors(
    sequences: Sequence[Sequence[int]], num_items: int, size: int = 32, window: int = 3, seed: int = 0
) -> Vectors:
    """Which items stand near each other: truncated SVD of positive pointwise mutual information, rows of length 1.

    Pass training sequences only. Items that none of them holds, or that no axis shows, are 0, and so are numbers beyond
    those of the items.

    Raises:
        InputError: no sequence of two items.
    """
    from scipy.sparse import coo_matrix, csr_matrix
    from sklearn.decomposition import TruncatedSVD

    items = np.concatenate([np.asarray(sequence, dtype=np.int64) for sequence in sequences])
    users = np.repeat(np.arange(len(sequences)), [len(sequence) for sequence in sequences])
    near = csr_matrix((num_items, num_items))
    for gap in range(1, window + 1):
        same = users[gap:] == users[:-gap]
        left, right = items[:-gap][same], items[gap:][same]
        near += csr_matrix((np.full(len(left), 1 / gap), (left, right)), near.shape)
    if not near.nnz:
        raise InputError("no sequence holds two items; collaborative vectors need sequences.")
    near = (near + near.T).tocoo()
    margins = np.asarray(near.sum(1)).ravel()
    information = np.log(near.data * margins.sum() / (margins[near.row] * margins[near.col]))
    positive = coo_matrix((np.maximum(information, 0), (near.row, near.col)), near.shape).tocsr()
    axes = min(size, num_items - 1)
    vectors = TruncatedSVD(axes, n_iter=7, random_state=seed).fit_transform(positive)
    return _unit(np.pad(vectors, ((0, 0), (0, size - axes))))


def _tfidf(**options: object) -> "TfidfVectorizer":
    from sklearn.feature_extraction.text import TfidfVectorizer

    # words of one character too: "size M" and "size L", "2 mm" and "3 mm" are different items
    words = r"(?u)\b\w+\b"
    settings = {"sublinear_tf": True, "ngram_range": (1, 2), "stop_words": "english", "max_features": 50_000}
    return TfidfVectorizer(token_pattern=words, **settings, **options)


def _unit(vectors: ndarray) -> Vectors:
    lengths = np.linalg.norm(vectors, axis=1, keepdims=True)
    # What no axis shows (words that all were left out, a few items apart from all others) is rounding, and would
    # become a direction of its own.
    shown = lengths > _ROUNDING
    return (np.where(shown, vectors, 0) / np.where(shown, lengths, 1)).astype(np.float32)
