"""Base+tokens: a Hugging Face causal LM whose vocabulary holds the semantic-ID tokens, made once per ID table.

The directory is an ordinary checkpoint (model, tokenizer) beside `sids.parquet` and `cladapt.json` (provenance).
"""

import warnings
from collections.abc import Mapping
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from pydantic import BaseModel, NonNegativeInt, PositiveInt
from torch import Tensor, nn

from cladapt import __version__
from cladapt.artifacts import atomic_dir, hash_value, read_record, write_json
from cladapt.data.schema import Stream
from cladapt.errors import ConfigError, DataError
from cladapt.model.generation import greedy
from cladapt.model.packed import TrieSoftmax
from cladapt.model.quantise import Quantisation, packed_options, skeleton
from cladapt.model.rows import tables
from cladapt.model.source import Unloadable, check_supported, open_source, read
from cladapt.model.weights import check_finite, saved_weights_hash, weights_hash
from cladapt.tokens.sids import SidTable
from cladapt.tokens.tokenizer import add_sid_tokens, make_tokenizer, sid_token_ids
from cladapt.tokens.trie import Trie

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

PRESETS: Mapping[str, dict[str, Any]] = {
    "tiny": {"hidden_size": 64, "intermediate_size": 192, "num_hidden_layers": 2, "num_attention_heads": 2},
    "small": {"hidden_size": 128, "intermediate_size": 384, "num_hidden_layers": 3, "num_attention_heads": 4},
    "medium": {"hidden_size": 256, "intermediate_size": 768, "num_hidden_layers": 6, "num_attention_heads": 8},
}
PROVENANCE = "cladapt.json"
LEFT_OUT = "generation_left_out"
"""The key of a base's `cladapt.json` for generation settings that it was not given; see `greedy`."""
RESTORE = "restore the base directory, or make the base again"
_OWN = "use the stream that this base was made for, or make a base for this one"


class BaseRecord(BaseModel):
    """What a base's `cladapt.json` must hold; `stream` and `config` where the commands made the base."""

    fingerprint: str
    fitted_block: NonNegativeInt
    sids: str
    ids: PositiveInt = 1
    stream: str = ""
    config: dict[str, Any] = {}
    form: Literal["packed", "prompt"] | None = None
    generation_left_out: dict[str, Any] = {}


class Made:
    """What the `cladapt.json` of a base says of it."""

    model: "PreTrainedModel"
    provenance: Mapping[str, Any]

    @property
    def fingerprint(self) -> str:
        """Identity of the weights and of what their outputs stand for, written when the base was saved."""
        return str(self.provenance["fingerprint"])

    @property
    def fitted_block(self) -> int:
        """Last block that the weights have learned; 0 for none."""
        return int(self.provenance["fitted_block"])

    @property
    def weights(self) -> str:
        """Identity of the weights as they are loaded."""
        return weights_hash(self.model)


@dataclass(frozen=True)
class Base(Made):
    """A base model with its tokenizer, ID table and provenance."""

    model: "PreTrainedModel"
    tokenizer: "PreTrainedTokenizerBase"
    sids: SidTable
    provenance: Mapping[str, Any]

    @property
    def auto_class(self) -> str:
        """The class of transformers that loads it."""
        return "AutoModelForCausalLM"

    @property
    def identity(self) -> Mapping[str, str]:
        """What an adapter says of its base beside the fingerprint."""
        return {"sids": str(self.provenance["sids"])}

    @property
    def version(self) -> int:
        """The version of the IDs that it was made with."""
        return int(self.provenance.get("ids", 1))

    @property
    def extra_parameters(self) -> Mapping[str, nn.Parameter]:
        """What learns with an adapter and is no part of it: nothing."""
        return {}

    @property
    def extra_tensors(self) -> Mapping[str, Tensor]:
        """What is saved with an adapter for that: nothing."""
        return {}

    def settle(self) -> None:
        """Nothing learned beside the adapter."""

    @property
    def task_type(self) -> str:
        """PEFT's name of its task."""
        return "CAUSAL_LM"

    def with_sids(self, table: SidTable) -> "Base":
        """The base with the IDs of `table`, a stream's, in place of its own.

        `DataError` where level sizes or versions differ, or an item that both have has another ID: the same tokens
        would stand for other items.
        """
        known = self.with_version(table)
        meaning = "the same tokens would stand for other items"
        if self.sids.version != table.version:
            raise DataError(
                f"the base has version {self.sids.version} of the IDs, the stream's are of version {table.version}: "
                f"{meaning}",
                "make a base for these IDs, or go back to those of the base: cladapt tokens refresh STREAM --back",
            )
        if (other := self.sids.first_other(table)) is not None:
            raise DataError(
                f"the base has the ID {self.sids.spelt(other)} for item {other!r}, the stream has "
                f"{table.spelt(other)}: {meaning}",
                _OWN,
            )
        return known

    def with_version(self, table: SidTable) -> "Base":
        """As `with_sids`, where items may have other IDs: those of a version that is asked for, in the same tokens."""
        if self.sids.sizes != table.sizes:
            raise DataError(
                f"the base has tokens for levels of {list(self.sids.sizes)} codes, the stream's IDs have levels of "
                f"{list(table.sizes)}: the same tokens would stand for other items",
                _OWN,
            )
        return replace(self, sids=table)

    def bos(self) -> int:
        """The token that opens a packed history."""
        for token in (self.tokenizer.bos_token_id, self.tokenizer.eos_token_id):
            if token is not None:
                return int(token)
        raise DataError("the tokenizer has neither a bos nor an eos token", "set one in its tokenizer_config.json")

    def item_tokens(self) -> torch.Tensor:
        """Token ids of every item's semantic ID: int64 [n_items, levels]."""
        ids = torch.from_numpy(sid_token_ids(self.tokenizer, self.sids))
        return ids[torch.from_numpy(self.sids.token_index).long()]


def trie_softmax(base: Base, trie: Trie) -> TrieSoftmax:
    """The softmax over a catalogue's trie in the vocabulary of `base`."""
    ids = torch.from_numpy(sid_token_ids(base.tokenizer, base.sids))
    levels = [ids[a:b] for a, b in pairwise(base.sids.offsets.tolist())]
    head = base.model.get_output_embeddings().weight
    return TrieSoftmax(trie, levels, len(head), head.device)


def new_model(
    preset: str, sids: SidTable, seed: int, tie_embeddings: bool = False
) -> "tuple[PreTrainedModel, PreTrainedTokenizerBase]":
    """A Llama-family model of `preset` size with random weights and a vocabulary of semantic-ID tokens alone."""
    from transformers import LlamaConfig, LlamaForCausalLM

    if preset not in PRESETS:
        raise ConfigError(f"base.preset={preset!r} is not a preset", f"use one of {', '.join(PRESETS)}")
    tokenizer = make_tokenizer(sids)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        max_position_embeddings=4096,
        tie_word_embeddings=tie_embeddings,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        **PRESETS[preset],
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        config._attn_implementation = "sdpa"
        return LlamaForCausalLM(config), tokenizer


def extend_model(
    source: str, sids: SidTable, seed: int, weights: Literal["pretrained", "random"] = "pretrained"
) -> "tuple[PreTrainedModel, PreTrainedTokenizerBase, list[int]]":
    """Any causal LM with the semantic-ID tokens added; also the ids of the new tokens. See `open_source`.

    New rows start at the mean of the old ones plus noise of a tenth of their spread, in the embedding and in an untied
    head, so that they are told apart but do not dominate the softmax. So do those of the tokenizer's own tokens for
    which the checkpoint has no rows, with a warning.
    """
    model, tokenizer = open_source(source, seed, weights)
    before, known = len(tokenizer), len(tables(model)[0])
    add_sid_tokens(tokenizer, sids)
    new = [int(i) for i in sid_token_ids(tokenizer, sids) if i >= before]
    if known < before:
        warnings.warn(
            f"{source}: the tokenizer has {before} tokens, the model rows for {known}: the others, the first "
            f"{tokenizer.convert_ids_to_tokens(known)!r}, get rows at the mean of those",
            stacklevel=2,
        )
    made = [*range(known, before), *new]
    rows = max(int(model.config.vocab_size), len(tokenizer))
    model.resize_token_embeddings(rows, mean_resizing=False)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for table in tables(model):
            old = table[: min(before, known)].float()
            noise = torch.randn(len(made), table.shape[1], generator=generator) * 0.1 * old.std(dim=0)
            table[made] = (old.mean(dim=0) + noise).to(table.dtype)
    return model, tokenizer, new


def check_home(base: Made, stream: Stream, base_name: str, stream_name: str) -> None:
    """`DataError` where the base has learned events of another stream than this one and its prefixes."""
    recorded = base.provenance.get("stream")
    learned = base.fitted_block or (1 if base.provenance.get("form") else 0)
    if learned and stream.home_of(recorded) is None:
        what = f"was trained on block {learned}" if base.fitted_block else "has ID rows fitted on block 1"
        raise DataError(
            f"{base_name} {what} of the stream {recorded}, {stream_name} is the stream {stream.fingerprint}",
            "use the stream that the base was made from, so that no test event is in its training data",
        )


def check_form(base: Base, form: str, history: str = "ids") -> None:
    """Warn where the ID rows of the base were fitted on another form of histories than the one to be learned.

    `history`: what a worded prompt names items by.
    """
    fitted = base.provenance.get("form")
    if fitted is not None and fitted != form:
        warnings.warn(
            f"the ID rows of the base were fitted on histories of the form {fitted!r}, train.form is {form!r}: make "
            f"the base with --form {form}, or train with train.form={fitted}",
            stacklevel=2,
        )
    elif (named := base.provenance.get("history", history)) != history:
        warnings.warn(
            f"the base was tuned on histories of {named}, train.history is {history}: tune it with history={history}, "
            f"or train with train.history={named}",
            stacklevel=2,
        )


def save_base(
    folder: Path,
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    sids: SidTable,
    provenance: Mapping[str, Any],
) -> None:
    """Write base+tokens as one directory, whole or not at all; see `write_base`."""
    with atomic_dir(folder) as temporary:
        write_base(temporary, model, tokenizer, sids, provenance)


def write_base(
    folder: Path,
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    sids: SidTable,
    provenance: Mapping[str, Any],
) -> None:
    """Write base+tokens into an existing folder, with a greedy generation config.

    `cladapt.json` names the settings of the model's own generation config that are left out.
    """
    from transformers.utils import logging

    logging.disable_progress_bar()
    check_finite("the model to be saved", dict(model.state_dict()), "train it again with a lower lr")
    model.generation_config, left_out = greedy(model.generation_config, sids.levels)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    sids.save(folder / "sids.parquet")
    record = {
        **provenance,
        LEFT_OUT: {**provenance.get(LEFT_OUT, {}), **left_out},
        "sids": sids.fingerprint,
        "ids": sids.version,
        "fingerprint": hash_value([weights_hash(model), sids.fingerprint]),
        "cladapt": __version__,
    }
    write_json(folder / PROVENANCE, record)


def base_provenance(folder: Path) -> dict[str, Any]:
    """The `cladapt.json` of a base+tokens directory."""
    return read_record(folder / PROVENANCE, BaseRecord, "restore this file, or make the base again")


def load_base(folder: Path, dtype: torch.dtype = torch.float32, quantisation: Quantisation = "none") -> Base:
    """Read a base+tokens directory; all parameters frozen, evaluation mode.

    With `4bit` its linear layers, the head apart, are quantised and compute in `dtype`; see `cladapt.model.quantise`.
    `DataError` where a weight is not finite, or the files are not those that were written; see `verify_weights`.
    """
    if not (folder / PROVENANCE).is_file():
        raise DataError(
            f"{folder} is not a base+tokens directory: it has no {PROVENANCE}",
            "make one with `cladapt base pretrain` or `cladapt base init`",
        )
    provenance = base_provenance(folder)
    try:
        model, tokenizer, strange = read(folder, dtype, **packed_options(quantisation, dtype))
        if strange:
            raise Unloadable(f"it has no place for {len(strange)} of its tensors, the first {strange[0]}")
    except Unloadable as error:
        raise DataError(f"{folder}: cannot load the model: {error}", "make the base again") from error
    sids = SidTable.load(folder / "sids.parquet")
    if sids.fingerprint != provenance["sids"]:
        raise DataError(
            f"{folder / 'sids.parquet'} has the hash {sids.fingerprint}, the base was made with {provenance['sids']}",
            "restore the base directory",
        )
    saved = model if quantisation == "none" else skeleton(model)
    verify_weights(folder, saved, sids.fingerprint, provenance["fingerprint"])
    check_supported(model)
    model.requires_grad_(False)
    return Base(model.eval(), tokenizer, sids, provenance)


def load_model(folder: Path, dtype: torch.dtype) -> "tuple[PreTrainedModel, PreTrainedTokenizerBase]":
    """The model and tokenizer of an ordinary checkpoint directory, in evaluation mode; `DataError` unless it is one."""
    try:
        model, tokenizer, _ = read(folder, dtype)
    except Unloadable as error:
        raise DataError(f"{folder}: cannot load the model: {error}", "restore the checkpoint") from error
    check_supported(model)
    return model.requires_grad_(False).eval(), tokenizer


def verify_weights(folder: Path, model: nn.Module, meaning: str, recorded: str) -> None:
    """`DataError` where the weights in `folder` are not those of the fingerprint that its `cladapt.json` has recorded.

    `meaning`: the hash of what the outputs stand for, IDs or classes. See `saved_weights_hash` for the cost.
    """
    found = saved_weights_hash(folder, model, RESTORE)
    if found is None:
        warnings.warn(
            f"{folder}: its weights are not compared with their fingerprint: transformers renames them on saving, and "
            "they were loaded in another dtype",
            stacklevel=2,
        )
    elif (fingerprint := hash_value([found, meaning])) != recorded:
        raise DataError(
            f"{folder}: its weights have the fingerprint {fingerprint}, {PROVENANCE} has recorded {recorded}: one of "
            "them was changed after the base was made",
            RESTORE,
        )
