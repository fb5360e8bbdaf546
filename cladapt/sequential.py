"""Settings of sequential backbones: recommenders over an item table, without a language model; see `cladapt.config`."""

from collections.abc import Mapping
from typing import Annotated, Literal

from pydantic import Field, model_validator

from cladapt.config import Dropout, FitConfig, Positive, PositiveFloat, Seed, Width
from cladapt.embedding import REC_PCA, RecPcaConfig
from cladapt.settings import Settings

Backbone = Literal["sasrec", "gru4rec", "bert4rec"]
Reduction = Literal["none", "pca", "whiten", "rec-pca", "alphafuse"]


class TableConfig(RecPcaConfig):
    """Where the vectors of items come from."""

    source: Literal["random", "llm"] = "random"
    """`random`: drawn from the seed and the item's id; `llm`: from the embedding of the item's text."""
    embedding: str = "tfidf"
    """What embeds texts: `tfidf`, or the name or path of a sentence-transformers model."""
    length: PositiveFloat = 0.16
    """Root mean square length of the rows of block 1 before anything is learned, whatever their source. Rows of rare
    items stay near where they start: long ones score them at random."""
    dimensions: Positive = 256
    """Dimensions kept of a TF-IDF embedding."""
    use: Literal["initialise", "frozen"] = "initialise"
    """`initialise`: the vectors are where learned rows start; `frozen`: they stay, below a learned linear layer."""
    reduction: Reduction = "pca"
    """How an embedding becomes as wide as the model, fitted on the items of block 1. `pca` (LLMInit); `whiten`: its
    columns at variance 1; `rec-pca`: smooth over the graph of items that the same users have; `alphafuse`: whitened,
    the leading directions frozen and the last `learned` ones learned; `none`: as it is."""
    learned: Positive = 32
    """Of `alphafuse`: how many of the last directions are learned."""

    @property
    def frozen(self) -> bool:
        """Whether no row is learned."""
        return self.source == "llm" and self.use == "frozen"

    @model_validator(mode="after")
    def _reductions_fit(self) -> "TableConfig":
        if self.frozen and self.reduction == "alphafuse":
            raise ValueError("reduction=alphafuse learns rows: expected use=initialise, use is frozen")
        return self

    def readers(self) -> Mapping[str, str]:
        """What embeds texts, and the graph, are read for diagnostics whatever the source."""
        found = {"dimensions": "table.embedding=tfidf"} if self.embedding != "tfidf" else {}
        if self.source == "random":
            return found | dict.fromkeys(("use", "reduction", "learned", "neighbours", *REC_PCA), "table.source=llm")
        if self.reduction != "rec-pca":
            found |= dict.fromkeys(("neighbours", *REC_PCA), "table.reduction=rec-pca")
        if self.reduction != "alphafuse":
            found["learned"] = "table.reduction=alphafuse"
        return found


class BackboneConfig(Settings):
    """What a sequential model is made of."""

    backbone: Backbone = "sasrec"
    """`sasrec` (causal self-attention), `gru4rec` (recurrent; adapters are on its input weights and dense layer, its
    recurrent weights stay the base's) or `bert4rec` (bidirectional, masked items)."""
    hidden: Width = 64
    """Width of the model and of an item's vector."""
    layers: Positive = 2
    """Layers."""
    heads: Positive = 2
    """Attention heads; no meaning for gru4rec."""
    window: Positive = 50
    """Most recent events that form a history."""
    dropout: Dropout = 0.2
    """Dropout on inputs, attention and branches, also while adapters learn."""
    normalise: Literal["none", "score", "both"] = "none"
    """Item vectors at length 1 in every pass: never, where items are scored, or where histories are read too."""
    temperature: Annotated[float, Field(ge=0.0)] = 0.0
    """Above 0 the sequence vector has length 1 too and scores are divided by this; 0 leaves its length free."""
    learn_temperature: bool = False
    """Let the base learn the temperature, from there on; adapters leave it."""

    @model_validator(mode="after")
    def _fits(self) -> "BackboneConfig":
        if self.backbone != "gru4rec" and self.hidden % self.heads:
            raise ValueError(f"hidden={self.hidden} is not a multiple of heads={self.heads}")
        if self.temperature and self.normalise == "none":
            raise ValueError(f"temperature={self.temperature:g} needs normalise=score or both, normalise is none")
        if self.learn_temperature and not self.temperature:
            raise ValueError("learn_temperature=yes needs temperature above 0, where it starts")
        return self


class SequentialBaseConfig(BackboneConfig):
    """How a sequential base is made and trained on block 1."""

    shown_by = "config show --for sequential"
    table: TableConfig = TableConfig()
    mask: Annotated[float, Field(gt=0.0, le=1.0)] = 0.2
    """Share of the targets that bert4rec hides in one pass; an epoch hides each of them once."""
    seed: Seed = 0
    """Seed of initialisation, order and dropout."""
    lr: PositiveFloat = 1e-3
    """Peak learning rate."""
    epochs: Positive = 60
    """Most epochs over block 1."""
    patience: Positive = 8
    """Stop after this many epochs without a better validation log-likelihood."""
    weight_decay: Annotated[float, Field(ge=0.0)] = 0.0
    """AdamW weight decay."""
    batch_sequences: Positive = 32
    """Sequences per optimiser step."""

    @model_validator(mode="after")
    def _freezes_some(self) -> "SequentialBaseConfig":
        table = self.table
        if (table.source, table.reduction) == ("llm", "alphafuse") and table.learned >= self.hidden:
            raise ValueError(f"table.learned={table.learned} leaves none of hidden={self.hidden} directions frozen")
        return self

    def readers(self) -> Mapping[str, str]:
        return {} if self.backbone == "bert4rec" else {"mask": "backbone=bert4rec"}


class SequentialTrainConfig(FitConfig):
    """How one block of interactions is learned by a sequential model."""

    batch_sequences: Positive = 32
    """Sequences per micro-batch."""
    rows: Literal["all", "new", "none"] = "all"
    """Which rows of an item table that learns a block learns beside the adapter: of all items known, of those that came
    with it, or none."""
    held_out: Literal["never", "next"] = "never"
    """When validation and test events are learned: `never`, or with the `next` block, when they are past; figures of
    later models on them are then marked."""
