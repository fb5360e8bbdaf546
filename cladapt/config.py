"""Settings of cladapt, each with its meaning, default and check; `cladapt.settings` resolves them.

Those of a method stand in its file, those of a run that classifies in the workload's, and those of item vectors in
`cladapt.embedding`.
"""

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, field_validator, model_validator

from cladapt.embedding import EmbeddingConfig
from cladapt.settings import (
    Codes,
    Dropout,
    Fraction,
    Positive,
    PositiveFloat,
    Seed,
    Settings,
    Weight,
    Width,
    describe,
    load_recipe,
    merge_overrides,
    resolve,
)

__all__ = ["Settings", "describe", "load_recipe", "merge_overrides", "resolve"]

_TRACKER = "(tensorboard|wandb|trackio|mlflow)"
Trackers = Annotated[str, Field(pattern=rf"^(none|{_TRACKER}(\+{_TRACKER})*)$")]


class BlocksConfig(Settings):
    """How a log is cut into time blocks."""

    shown_by = "config show --for import"
    fractions: tuple[Annotated[float, Field(gt=0.0)], ...] = (0.6, 0.1, 0.1, 0.1, 0.1)
    """Share of the interactions in each block, in time order; a sum within 1 % of 1 is scaled to 1."""
    dates: tuple[str, ...] = ()
    """First day (YYYY-MM-DD, UTC) of block 2, 3, …; replaces `fractions` when given."""
    min_events: Positive = 5
    """A user is tested in a block with at least this many events there (never fewer than 3); nothing is dropped: the
    events of other users are learned and are history."""
    k_core: Annotated[int, Field(ge=0)] = 0
    """In each block, repeatedly drop events whose user or item has fewer than this up to that block; 0 keeps all."""

    @field_validator("fractions")
    @classmethod
    def _sum_to_one(cls, value: tuple[float, ...]) -> tuple[float, ...]:
        total = sum(value)
        if abs(total - 1.0) > 0.01:
            raise ValueError(f"the fractions sum to {total:g}, expected 1")
        return value if abs(total - 1.0) < 1e-9 else tuple(share / total for share in value)


class SimulateConfig(Settings):
    """A seeded stream of drifting preferences whose true next-item distribution is known."""

    shown_by = "config show --for simulate"
    seed: Seed = 0
    """Seed of everything random."""
    users: Positive = 600
    """Users over the whole stream."""
    items: Annotated[int, Field(ge=20)] = 300
    """Items over the whole stream, those born later included."""
    topics: Annotated[int, Field(ge=2)] = 12
    """Topics; an item belongs to one, and a topic to its successors by a transition matrix."""
    blocks: Annotated[int, Field(ge=2)] = 5
    """Time blocks."""
    drift: Fraction = 0.3
    """Share of the topics whose transitions are drawn anew at each later block."""
    births: Fraction = 0.15
    """Share of the items that first appear after block 1."""
    skew: Annotated[float, Field(ge=0.0)] = 1.0
    """Zipf exponent of the popularity inside a topic."""
    persistence: Fraction = 0.3
    """Weight of the user's own topic history against the topic transition from the last item."""
    events: Annotated[int, Field(ge=5)] = 8
    """Mean events of a user in a block (at least 5 each)."""
    activity: Annotated[float, Field(gt=0.0, le=1.0)] = 0.4
    """Probability that a user is active in a later block; block 1 has all users but the late-comers."""


class TokensConfig(EmbeddingConfig):
    """How items get semantic IDs."""

    shown_by = "config show --for tokens"
    levels: Positive = 3
    """Levels of the residual k-means."""
    codes: Annotated[int, Field(ge=2, le=10**6)] = 64
    """Codes per level; of an index the least that its levels but the last have room for."""
    deduplicate: bool = True
    """Add a level that tells items with equal codes apart."""
    capacity: Codes = 512
    """Codes of that level (and the least of an index's last one), fixed for the life of the stream: once more items
    have equal codes, they share IDs. Costs `capacity` rows of the model's embedding and as many of its head, width x
    capacity parameters each, and nothing in the trie softmax."""
    seed: Seed = 0
    """Seed of k-means, and of where the eigenvectors of a large matrix are looked for."""


class StartConfig(Settings):
    """How a pretrained checkpoint becomes a base with ID tokens."""

    weights: Literal["pretrained", "random"] = "pretrained"
    """`random`: the checkpoint's architecture and tokenizer, its weights drawn anew: the control without knowledge."""
    rows: Literal["meaning", "random"] = "meaning"
    """Where the rows of new ID tokens start, with a little noise. `meaning`: at the mean of the rows of the words in
    the texts of block 1's items that have the code; `random`: at the mean of all rows, as codes without words do."""
    untie: bool = False
    """Give a base whose head is its embedding table a head of its own, a copy, so that output rows can differ."""


class BaseConfig(Settings):
    """How a base learns block 1, all of it or the rows of its ID tokens."""

    seed: Seed = 0
    """Seed of initialisation and order."""
    lr: PositiveFloat = 2e-3
    """Peak learning rate."""
    epochs: Annotated[int, Field(ge=0)] = 30
    """Most epochs over block 1."""
    patience: Positive = 4
    """Stop after this many epochs without a better validation log-likelihood."""
    softmax: Literal["trie", "vocabulary"] = "trie"
    """As `train.softmax`."""
    weight_decay: Annotated[float, Field(ge=0.0)] = 0.1
    """AdamW weight decay."""
    batch_tokens: Positive = 4096
    """Tokens per optimiser step, padding included."""
    row_tokens: Positive = 256
    """Tokens per packed row."""
    window: Positive = 20
    """Most recent items that form a history."""


class PretrainConfig(BaseConfig):
    """How a base is made from scratch."""

    shown_by = "config show --for pretrain"
    preset: Literal["tiny", "small", "medium"] = "tiny"
    """Size of the model."""
    tie_embeddings: bool = False
    """One table for embedding and head, which then cannot be adapted."""
    dropout: Dropout = 0.2
    """Dropout on embeddings and residual branches while pretraining."""


class InitConfig(BaseConfig, StartConfig):
    """How a pretrained checkpoint gets ID tokens, and how their rows are fitted."""

    shown_by = "config show --for init"


class AdapterConfig(Settings):
    """The LoRA adapter, created through PEFT."""

    rank: Width = 8
    """Rank r."""
    alpha: PositiveFloat = 16.0
    """Scale: alpha / r, or alpha / sqrt(r) with `rslora`."""
    dropout: Dropout = 0.05
    """Dropout on the adapter's input."""
    targets: str | tuple[str, ...] = "auto"
    """Modules to adapt: `auto` (every linear layer, the head too where it does not share the embedding's weights),
    `all-linear` (without the head), a list of name endings, or one regular expression."""
    rslora: bool = False
    """Rank-stabilised scale."""

    @field_validator("targets", mode="before")
    @classmethod
    def _text_or_texts(cls, value: Any) -> Any:
        texts = [value] if isinstance(value, str) else value
        if not isinstance(texts, list | tuple) or not texts or not all(isinstance(t, str) and t for t in texts):
            raise ValueError("expected a text or a list of texts")
        return value


class MethodConfig(Settings):
    """Which continual method runs, and its own options."""

    name: str = "peso"
    """A method, or several joined by `+`, applied in that order."""
    options: Mapping[str, Any] = {}
    """Options of the method; for several methods `<method>.<field>`."""


class LearningConfig(Settings):
    """How weights are learned, whatever they are."""

    lr: PositiveFloat = 2e-3
    """Peak learning rate."""
    epochs: Positive = 6
    """Epochs per block."""
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    """Shape of the learning rate after warm-up."""
    warmup: Fraction = 0.05
    """Share of the steps that warm up."""
    weight_decay: Annotated[float, Field(ge=0.0)] = 0.01
    """AdamW weight decay."""
    clip: Annotated[float, Field(ge=0.0)] = 1.0
    """Largest gradient norm; 0 turns clipping off."""
    accumulation: Positive = 1
    """Micro-batches per optimiser step."""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """Compute precision; adapter weights and optimiser state stay fp32 in both. `auto`: bf16 on a GPU that has it, else
    fp32; a run records which."""
    checkpointing: bool = False
    """Keep of each layer its input alone, and compute the layer again in the backward pass: less memory, the same
    gradients, about a third more time."""
    keep: Literal["best", "last"] = "best"
    """Which epoch's adapter a block keeps: best validation log-likelihood, or the last."""
    checkpoint_steps: Annotated[int, Field(ge=0)] = 0
    """Optimiser steps between checkpoints inside a block; 0 writes them at block ends only."""

    def lr_of(self, block: int) -> float:
        """Peak learning rate on a block."""
        return self.lr


class FitConfig(LearningConfig):
    """How one block is learned, whatever it holds."""

    block_lr_factor: PositiveFloat = 1.0
    """Factor on `lr` for every later block."""

    def lr_of(self, block: int) -> float:
        """Peak learning rate on a block."""
        return self.lr * (self.block_lr_factor if block > 1 else 1.0)


class HistoriesConfig(Settings):
    """How histories become rows of tokens, and what an item competes with."""

    batch_tokens: Positive = 2048
    """Tokens per micro-batch, padding included."""
    row_tokens: Positive = 256
    """Tokens per packed row."""
    window: Positive = 20
    """Most recent items that form a history."""
    window_step: Positive = 1
    """Items by which the window of a worded prompt moves on in training: more than 1 gives a user's prompts more of a
    common beginning, which is computed once, and from `window - window_step + 1` to `window` items to see."""
    form: Literal["packed", "prompt"] = "packed"
    """`packed`: all targets of a user in one causal pass; `prompt`: a worded prompt per target (LC-Rec family)."""
    history: Literal["ids", "titles", "both"] = "ids"
    """What a worded prompt names items by: semantic IDs, titles (the items' texts), or each ID with its title."""
    history_tokens: Annotated[int, Field(ge=0, le=2**16)] = 0
    """Most tokens of a worded prompt's history, the oldest items are left out; 0: what a row has room for."""
    softmax: Literal["trie", "vocabulary"] = "trie"
    """`trie`: a code competes with what catalogue items have after the same prefix; `vocabulary`: with all tokens."""

    @model_validator(mode="after")
    def _rows_fit(self) -> "HistoriesConfig":
        if self.row_tokens > self.batch_tokens:
            raise ValueError(f"row_tokens={self.row_tokens} exceeds batch_tokens={self.batch_tokens}")
        return self

    @model_validator(mode="after")
    def _worded(self) -> "HistoriesConfig":
        if self.form != "prompt":
            for key, default in (("history", "ids"), ("history_tokens", 0), ("window_step", 1)):
                if (value := getattr(self, key)) != default:
                    raise ValueError(f"{key}={value} needs form=prompt, form is {self.form}")
        if self.window_step > self.window:
            raise ValueError(f"window_step={self.window_step} exceeds window={self.window}")
        return self


class TrainConfig(HistoriesConfig, FitConfig):
    """How one block of interactions is learned."""

    held_out: Literal["never", "next"] = "never"
    """When validation and test events are learned: `never`, or with the `next` block, when they are past; figures of
    later models on them are then marked."""


class TaskWeights(Settings):
    """How many times an epoch goes through the documents of each task: 0.5 draws half of them anew each epoch."""

    sequence: Weight = 1.0
    """A history as `form` says -> ID of the next item: what epochs are judged by, and what adapters go on learning."""
    title_to_id: Weight = 0.0
    """Text of an item -> its ID."""
    id_to_title: Weight = 0.0
    """ID of an item -> its text."""
    titles_to_id: Weight = 0.0
    """Texts of a history -> ID of the next item."""
    ids_to_title: Weight = 0.0
    """IDs of a history -> text of the next item."""

    @property
    def alignment(self) -> dict[str, float]:
        """The tasks that read or write texts and take part."""
        weights: dict[str, float] = self.model_dump(exclude={"sequence"})
        return {name: weight for name, weight in weights.items() if weight}

    @model_validator(mode="after")
    def _something_to_learn(self) -> "TaskWeights":
        if not self.sequence and not self.alignment:
            raise ValueError("all weights are 0, expected one above")
        return self


class TuneConfig(HistoriesConfig, StartConfig, LearningConfig):
    """How a pretrained base is tuned on block 1, before adapters start."""

    shown_by = "config show --for tune"
    seed: Seed = 0
    """Seed of initialisation, order and dropout."""
    rank: Annotated[int, Field(ge=0, le=2**16)] = 0
    """0: all weights learn; above: a LoRA of this rank in every linear layer but the head, merged at the end. The rows
    of ID tokens learn either way."""
    alpha: PositiveFloat = 16.0
    """Scale of that LoRA: alpha / rank."""
    dropout: Dropout = 0.0
    """Dropout on the input of that LoRA."""
    tasks: TaskWeights = TaskWeights()
    title_tokens: Positive = 24
    """Most tokens of one item's text that a task reads or writes; the rest is cut and counted. Histories of titles are
    instead cut to a row, the oldest items first."""
    lr: PositiveFloat = 2e-4
    """Peak learning rate; a LoRA takes about ten times that of all weights."""
    epochs: Positive = 10
    """Most epochs over block 1."""
    patience: Positive = 2
    """Stop after this many epochs without a better validation log-likelihood of the sequence task."""
    weight_decay: Annotated[float, Field(ge=0.0)] = 0.01
    """AdamW weight decay, on the matrices of linear layers alone."""
    checkpoint_steps: Annotated[int, Field(ge=0)] = 0
    """Optimiser steps between checkpoints; 0: as many as an epoch has. Stopping the command writes one too."""


class ImageTrainConfig(FitConfig):
    """How one block of classes is learned."""

    epochs: Positive = 20
    """Epochs per block."""
    batch_images: Positive = 32
    """Images per micro-batch."""


class EvalConfig(Settings):
    """How a model is measured."""

    shown_by = "config show --for eval"
    top_k: tuple[Width, ...] = (5, 10)
    """Cut-offs of HR and NDCG."""
    beams: Width = 20
    """Beam width; never narrowed. Must be at least the largest cut-off."""
    batch_users: Positive = 128
    """Users decoded at once; halved when memory runs out."""
    exclude_seen: bool = True
    """Never recommend an item of the user's own history (for all rows of the table alike)."""
    scope: Literal["matrix", "current"] = "matrix"
    """`matrix`: every model on every block; `current`: each on its own block, the base on every later one."""
    targets: Literal["test", "valid"] = "test"
    """`test`: what is reported; `valid`: what hyper-parameters are chosen by."""
    max_users: Annotated[int, Field(ge=0)] = 0
    """Evaluate a seeded sample of this many users per block; 0 takes all."""
    next_block: bool = True
    """Also test each model on the first events of the block after its own, as a served model meets them."""
    bootstrap: Annotated[int, Field(ge=100)] = 2000
    """Resamples behind an interval."""

    @model_validator(mode="after")
    def _beams_cover(self) -> "EvalConfig":
        if not self.top_k:
            raise ValueError("top_k is empty, expected at least one cut-off")
        if len(set(self.top_k)) < len(self.top_k):
            raise ValueError(f"top_k={list(self.top_k)} names a cut-off twice")
        if self.beams < max(self.top_k):
            raise ValueError(f"beams={self.beams} is below the largest top_k={max(self.top_k)}")
        return self


class PromoteConfig(Settings):
    """When a new adapter takes the place of the present one."""

    shown_by = "config show --for promote"
    rule: Literal["not-worse", "shown", "always"] = "not-worse"
    """`not-worse`: it is not shown worse than the present adapter, the base alone or block popularity; `shown`: and it
    is shown better than the present adapter, or the base where there is none; `always`."""
    hits_margin: Fraction = 0.0
    """How much lower the hit rate at the largest `eval.top_k` may be shown."""
    log_likelihood_margin: Annotated[float, Field(ge=0.0)] = 0.0
    """How much lower the log-likelihood of the target item may be shown, in nats."""
    bootstrap: Annotated[int, Field(ge=100)] = 2000
    """Resamples behind an interval."""


class RunSettings(Settings):
    """What a run of any task is asked; the tasks are the files of `cladapt.workloads`."""

    task: ClassVar[str]
    """Name of the workload that these settings are for."""
    seed: Seed = 0
    """Seed of adapter initialisation, order and dropout."""
    data: str = ""
    """Stream directory."""
    base: str = ""
    """Base directory."""
    kernels: Literal["auto", "triton", "reference"] = "auto"
    """Which implementation of the ops runs; `CLADAPT_KERNELS` overrides it."""
    track: Trackers = "none"
    """Where figures go too: `tensorboard`, `wandb`, `trackio`, `mlflow`, several joined by `+`, or `none`; local."""
    adapter: AdapterConfig = AdapterConfig()
    method: MethodConfig = MethodConfig()
    train: FitConfig = FitConfig()
    eval: Settings = Settings()


class RunConfig(RunSettings):
    """A whole run: `cladapt train` resolves one, the run directory keeps it."""

    task: ClassVar[str] = "recommend"
    data: str = ""
    """Stream directory; empty = the embedded simulated stream."""
    base: str = ""
    """Base+tokens directory; empty = the embedded tiny base."""
    from_adapter: str = ""
    """Adapter directory that the first block starts from; empty = a fresh adapter."""
    ids: Annotated[int, Field(ge=0)] = 0
    """Version of the stream's IDs to learn by; 0 = the current one, which base and adapter must be made with."""
    quantisation: Literal["none", "4bit"] = "none"
    """`4bit`: the frozen base in bitsandbytes' NF4 while adapters learn and are measured (QLoRA); adapters are as
    ever, and merging takes the base as it was saved. Needs the `quant` extra."""
    sharding: Literal["none", "full"] = "none"
    """`full`: of every layer of the frozen base each of several processes keeps a share while adapters learn (FSDP2);
    adapters, embedding and head stay whole on each, and so does the base in evaluation."""
    train: TrainConfig = TrainConfig()
    eval: EvalConfig = EvalConfig()


class ImagesConfig(Settings):
    """How images become a stream of blocks of classes."""

    shown_by = "config show --for images"
    blocks: Positive = 10
    """Blocks of classes."""
    size: Annotated[int, Field(ge=1, le=1024)] = 28
    """Side in pixels that images are resized to."""
    channels: Literal[1, 3] = 1
    """1 (grey) or 3 (colour)."""
    invert: bool = False
    """Dark drawings on white become light on black."""
    seed: Seed = 0
    """Seed of the order of the classes and of the splits."""


class VitConfig(Settings):
    """How a small vision transformer is made and trained, as the base of class-incremental learning."""

    shown_by = "config show --for vision"
    hidden: Positive = 64
    """Width; its heads are 16 wide."""
    layers: Positive = 4
    """Transformer layers."""
    patch: Positive = 4
    """Side of a patch in pixels; must divide the images' side."""
    seed: Seed = 0
    """Seed of initialisation, order and dropout."""
    lr: PositiveFloat = 1e-3
    """Peak learning rate."""
    epochs: Positive = 60
    """Most epochs."""
    patience: Positive = 10
    """Stop after this many epochs without a better validation log-likelihood."""
    dropout: Dropout = 0.0
    """Dropout on hidden states while training."""
    warp: Fraction = 0.2
    """Each training image is turned, stretched and shifted at random, by up to this many radians and shares."""
    weight_decay: Annotated[float, Field(ge=0.0)] = 0.05
    """AdamW weight decay."""
    batch_images: Positive = 64
    """Images per optimiser step."""

    @model_validator(mode="after")
    def _whole_heads(self) -> "VitConfig":
        if self.hidden % 16:
            raise ValueError(f"hidden={self.hidden} is not a multiple of 16, the width of a head")
        return self


class ClassEvalConfig(Settings):
    """How class-incremental learning is measured."""

    shown_by = "config show --for eval --task classify"
    batch_images: Positive = 256
    """Images at once."""
    bootstrap: Annotated[int, Field(ge=100)] = 2000
    """Resamples behind an interval."""
    targets: Literal["test", "valid"] = "test"
    """`test`: what is reported; `valid`: what hyper-parameters are chosen by, and biases of blocks fitted on, so that
    these are not judged."""
