"""Sequential bases: a directory with the model of block 1, the frozen map from texts to rows, and their record."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import polars as pl
import torch
from pydantic import BaseModel, NonNegativeInt, PositiveFloat
from torch import Tensor, nn

from cladapt import __version__
from cladapt.artifacts import atomic_dir, hash_file, hash_value, read_record, read_tensors, write_json, write_tensors
from cladapt.config import resolve
from cladapt.data.schema import Stream
from cladapt.errors import DataError
from cladapt.model.adapter import ITEMS
from cladapt.model.load import PROVENANCE, RESTORE, Made, verify_weights
from cladapt.model.sequence import ItemTable, SequenceModel
from cladapt.model.weights import WEIGHTS, check_finite, weights_hash
from cladapt.sequential import SequentialBaseConfig
from cladapt.tokens.table import TextMap, start_rows

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class SequenceRecord(BaseModel):
    """What a sequential base's `cladapt.json` must hold."""

    fingerprint: str
    fitted_block: NonNegativeInt
    stream: str
    items: str
    config: dict[str, Any]
    files: dict[str, str]
    scale: PositiveFloat


@dataclass(frozen=True)
class SequenceBase(Made):
    """A sequential model with its provenance, and the map behind its table where it has one."""

    model: "PreTrainedModel"
    config: SequentialBaseConfig
    texts: TextMap | None
    provenance: Mapping[str, Any]
    saved_weights: str

    @property
    def sequence(self) -> SequenceModel:
        """The model as what it is."""
        return cast(SequenceModel, self.model)

    @property
    def weights(self) -> str:
        """Identity of the weights as they were saved: the table grows with the stream."""
        return self.saved_weights

    @property
    def task_type(self) -> None:
        """PEFT has no name for this task."""

    @property
    def auto_class(self) -> str:
        """The class of transformers that loads it: none does."""
        return ""

    @property
    def identity(self) -> Mapping[str, str]:
        """What an adapter says of its base beside the fingerprint."""
        return {"items": str(self.provenance["items"])}

    @property
    def extra_parameters(self) -> Mapping[str, nn.Parameter]:
        """The learned rows of the table, by the name that a saved adapter has for them; none where all is frozen."""
        rows = self.sequence.items.rows
        return {} if rows is None else {f"base_model.model.{ITEMS}.rows": rows}

    @property
    def extra_tensors(self) -> Mapping[str, Tensor]:
        """Those of the items known to the block that is learned: later ones are no part of its adapter."""
        return {name: rows[: self.sequence.items.learned] for name, rows in self.extra_parameters.items()}

    def settle(self) -> None:
        """Rows are saved as they are."""

    def extend(self, stream: Stream) -> None:
        """Give the items of the stream that come after the table's their rows: by their texts, or drawn."""
        items = self.sequence.items
        if len(items) < stream.n_items:
            later = stream.items[len(items) :]
            start = start_rows(later, self.texts, self.config.hidden, self.config.seed, self.config.table.length)
            items.extend(torch.from_numpy(start))


def new_model(config: SequentialBaseConfig, items: pl.DataFrame, texts: TextMap | None) -> SequenceModel:
    """A model with random weights over the items of block 1."""
    start = torch.from_numpy(start_rows(items, texts, config.hidden, config.seed, config.table.length))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        return SequenceModel(config, _table(config, start))


def _table(config: SequentialBaseConfig, start: Tensor) -> ItemTable:
    if config.table.frozen:
        return ItemTable(start, None, config.hidden)
    learned = config.table.learned if _fuses(config) else config.hidden
    fixed = start[:, : max(0, config.hidden - learned)].clone()
    return ItemTable(fixed if fixed.shape[1] else None, start[:, fixed.shape[1] :].clone())


def _fuses(config: SequentialBaseConfig) -> bool:
    return config.table.source == "llm" and config.table.reduction == "alphafuse"


def items_hash(stream: Stream, block: int) -> str:
    """Identity of the items that the first rows of a table stand for: those known by a block, with their texts."""
    known = stream.items.filter(pl.col("first_block") <= block)
    return hash_value(known.select("item", "text").rows())


def save_sequence_base(
    folder: Path, model: SequenceModel, texts: TextMap | None, stream: Stream, provenance: Mapping[str, Any]
) -> None:
    """Write a base directory of the items known at block 1, whole or not at all."""
    check_finite("the model to be saved", dict(model.state_dict()), "train it again with a lower lr")
    with atomic_dir(folder) as temporary:
        write_tensors(temporary / WEIGHTS, {name: t.contiguous() for name, t in model.state_dict().items()})
        if texts is not None:
            texts.save(temporary)
        names = [] if texts is None else texts.files
        files = {name: hash_file(temporary / name) for name in names}
        items = hash_value([items_hash(stream, 1), files])
        record = {
            **provenance,
            "items": items,
            "files": files,
            "scale": 1.0 if texts is None else texts.scale,
            "fingerprint": hash_value([weights_hash(model), items]),
            "cladapt": __version__,
        }
        write_json(temporary / PROVENANCE, record)


def base_record(folder: Path) -> dict[str, Any]:
    """The `cladapt.json` of a sequential base."""
    if not (folder / PROVENANCE).is_file():
        raise DataError(
            f"{folder} is not a sequential base: it has no {PROVENANCE}", "make one with `cladapt base sequential`"
        )
    return read_record(folder / PROVENANCE, SequenceRecord, RESTORE)


def load_sequence_base(folder: Path) -> SequenceBase:
    """Read a sequential base; all parameters frozen, evaluation mode; the items are those of block 1."""
    record = base_record(folder)
    config = resolve(SequentialBaseConfig, record["config"], str(folder / PROVENANCE))
    tensors = read_tensors(folder / WEIGHTS)
    for name, written in record["files"].items():
        if not (folder / name).is_file() or hash_file(folder / name) != written:
            raise DataError(f"{folder / name} is not the file that {PROVENANCE} was written for", RESTORE)
    fixed, rows = tensors.get(f"{ITEMS}.fixed"), tensors.get(f"{ITEMS}.rows")
    try:
        if fixed is None and rows is None:
            raise ValueError(f"it has neither {ITEMS}.fixed nor {ITEMS}.rows")
        model = SequenceModel(config, ItemTable(fixed, rows, config.hidden if config.table.frozen else None))
        model.load_state_dict(tensors)
    except (RuntimeError, ValueError) as error:
        reason = " ".join(str(error).split())[:300]
        raise DataError(f"{folder / WEIGHTS} does not hold the model of {PROVENANCE}: {reason}", RESTORE) from error
    verify_weights(folder, model, record["items"], record["fingerprint"])
    texts = TextMap.load(folder, config.table, record["scale"]) if config.table.source == "llm" else None
    model.requires_grad_(False).eval()
    return SequenceBase(cast("PreTrainedModel", model), config, texts, record, weights_hash(model))
