"""Settings of the vectors of items: an embedding, its reduction, and the graph of what users have together."""

from collections.abc import Mapping
from typing import Annotated, Literal

from pydantic import Field, model_validator

from cladapt.settings import Fraction, Positive, Settings, Weight

COOCCURRENCE = "cooccurrence"
"""The embedding that takes no texts."""
REC_PCA = ("smoothness", "whitening", "balance")
"""Settings of Rec-PCA alone."""


class RecPcaConfig(Settings):
    """How Rec-PCA weighs an item graph, and how the graph is made."""

    smoothness: Weight = 1.0
    """lambda of Rec-PCA: weight of the smoothness over the graph. 0 is PCA; most changes between 0.9 and 1.5."""
    whitening: Fraction = 0.0
    """Exponent a of Rec-PCA's partial whitening, singular values s become s^(1 - a); at 1 the graph alone decides."""
    balance: bool = False
    """Give variance and smoothness equal traces before Rec-PCA weighs them."""
    window: Annotated[int, Field(ge=0)] = 0
    """Items among this many events of a user in a row count as had together (2: neighbours); 0: all of a history."""
    neighbours: Annotated[int, Field(ge=0)] = 50
    """Strongest edges of an item that the graph keeps; 0 keeps all."""
    weighting: Literal["count", "log1p"] = "count"
    """Weight of an edge by the number of users: itself, or log(1 + count)."""


class EmbeddingConfig(RecPcaConfig):
    """What an item's vector is made of."""

    embedding: str = "tfidf"
    """Of the items' texts `tfidf`, the name or path of a sentence-transformers model, or the path of a causal LM (the
    mean of its last hidden states); `cooccurrence` takes no texts but what users have together."""
    dimensions: Positive = 64
    """Dimensions kept of a TF-IDF or co-occurrence embedding."""
    reduce: Literal["none", "pca", "whiten", "rec-pca"] = "none"
    """How the embedding of texts is reduced, fitted on the items of block 1. `whiten` is PCA with columns of variance
    1; `rec-pca` keeps what varies and is smooth over the graph of items that the same users have in block 1."""
    components: Positive = 32
    """Dimensions that the reduction keeps; as many as the embedding has leave all distances as they are."""

    @model_validator(mode="after")
    def _reduces_texts(self) -> "EmbeddingConfig":
        if self.embedding == COOCCURRENCE and self.reduce != "none":
            raise ValueError(
                f"reduce={self.reduce!r} reduces an embedding of texts, and embedding={COOCCURRENCE!r} has no texts: "
                "choose its width by dimensions"
            )
        return self

    def readers(self) -> Mapping[str, str]:
        found = {} if self.reduce == "rec-pca" else dict.fromkeys(REC_PCA, "reduce=rec-pca")
        if self.reduce != "rec-pca" and self.embedding != COOCCURRENCE:
            found["neighbours"] = f"reduce=rec-pca or embedding={COOCCURRENCE}"
        if self.reduce == "none":
            found["components"] = "reduce=pca, whiten or rec-pca"
        if self.embedding not in ("tfidf", COOCCURRENCE):
            found["dimensions"] = f"embedding=tfidf or {COOCCURRENCE}"
        return found
