"""Texts to vectors by a pretrained model: one of sentence-transformers, or a causal LM whose last states are averaged.

What lies in a directory decides: `modules.json` is sentence-transformers', a `config.json` with the architecture of a
causal LM that one. A name that is no directory is sentence-transformers', from the hub.
"""

import json
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from cladapt.artifacts import read_tensors, write_tensors
from cladapt.errors import DataError, EnvironmentProblem
from cladapt.tokens.vector_cache import Cached, Encode, model_identity

EMBEDDING = "embedding.safetensors"
PROBE = "a text by which a model is recognised"
MOST_TOKENS = 512
"""Tokens of a text that a causal LM reads."""
BATCH_TOKENS = 8192
"""Tokens of a batch, padding included."""
_FORMS = "expected modules.json (sentence-transformers), or a config.json with a causal LM among its architectures"


@dataclass(frozen=True, eq=False)
class TextModel:
    """A model by its name, and the vector of `PROBE` that shows whether it still is the same."""

    name: str
    probe: np.ndarray
    model: Encode
    files: ClassVar[Sequence[str]] = (EMBEDDING,)

    @classmethod
    def fit(cls, name: str) -> "TextModel":
        """The model as it is now."""
        model = open_model(name)
        return cls(name, _encoded(model, [PROBE])[0], model)

    @cached_property
    def encode(self) -> Encode:
        """The model itself; `DataError` where it gives another vector for the probe than it gave at first."""
        found = _encoded(self.model, [PROBE])[0]
        if found.shape != self.probe.shape or not np.allclose(found, self.probe, rtol=1e-3, atol=1e-4):
            raise DataError(
                f"the model {self.name!r} gives other vectors than when the IDs were built",
                "put back the model that the IDs were built with",
            )
        return self.model

    def vectors(self, texts: Sequence[str]) -> np.ndarray:
        """Vectors of any length, float64 [n, d]; zeros for a blank text."""
        vectors = _encoded(self.encode, texts)
        vectors[[not text.strip() for text in texts]] = 0.0
        return vectors

    def save(self, folder: Path) -> None:
        import torch

        write_tensors(folder / EMBEDDING, {"probe": torch.from_numpy(self.probe)})

    @classmethod
    def load(cls, folder: Path, name: str) -> "TextModel":
        tensors = read_tensors(folder / EMBEDDING)
        if set(tensors) != {"probe"}:
            raise DataError(
                f"{folder / EMBEDDING}: tensors {', '.join(sorted(tensors))}, expected probe",
                "restore this file: it belongs to the IDs of the stream",
            )
        return cls(name, tensors["probe"].numpy(), open_model(name))


def open_model(name: str) -> Encode:
    """What gives the vectors of texts, float32 [n, d]: the model in a directory with a cache, or one by its name.

    The directory's weights are read when the first text is not in the cache.
    """
    folder = Path(name).expanduser()
    if not folder.exists():
        return _SentenceTransformer(name)
    kind = _CausalLM if _is_causal(folder) else _SentenceTransformer
    return Cached(kind(str(folder)), model_identity(folder), uncounted=[PROBE])


def _encoded(encode: Encode, texts: Sequence[str]) -> np.ndarray:
    return encode(texts).astype(np.float64)


def _is_causal(folder: Path) -> bool:
    """Whether a causal LM lies in a directory, rather than a sentence-transformers model; `DataError` for neither."""
    if not folder.is_dir():
        raise DataError(f"tokens.embedding={str(folder)!r} is a file", f"give the model's directory: {_FORMS}")
    if (folder / "modules.json").is_file():
        return False
    if not (folder / "config.json").is_file():
        names = sorted(path.name for path in folder.iterdir())
        shown = ", ".join(names[:5]) + (", …" if len(names) > 5 else "") if names else "nothing"
        raise DataError(f"tokens.embedding={str(folder)!r} holds no model: found {shown}", _FORMS)
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as CAUSAL

    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        architectures = list(map(str, config.get("architectures") or ()))
    except (OSError, ValueError, AttributeError, TypeError) as error:
        raise DataError(f"{folder / 'config.json'} is not a model's: {error}", _FORMS) from error
    if not set(architectures) & set(CAUSAL.values()):
        raise DataError(
            f"tokens.embedding={str(folder)!r} is a model of {', '.join(architectures) or 'no named architecture'}",
            f"{_FORMS}; sentence-transformers saves any encoder with its pooling in its own form",
        )
    return True


class _SentenceTransformer:
    """A model of the package sentence-transformers, loaded when it is first asked."""

    def __init__(self, name: str) -> None:
        self.name = name

    @cached_property
    def model(self) -> Any:
        try:
            from sentence_transformers import SentenceTransformer
        except ImportError as error:
            raise EnvironmentProblem(
                f"tokens.embedding={self.name!r} needs the package sentence-transformers",
                "pip install cladapt[embed], give the directory of a causal LM, or use tokens.embedding=tfidf",
            ) from error
        from transformers.utils import logging

        logging.disable_progress_bar()
        try:
            return SentenceTransformer(self.name)
        except (OSError, ValueError) as error:
            reason = str(error).strip().partition("\n")[0]
            raise DataError(
                f"cannot load the sentence-transformers model {self.name!r}: {reason}",
                "give a local model directory, or a hub name that this machine can reach",
            ) from error

    def __call__(self, texts: Sequence[str]) -> np.ndarray:
        vectors = self.model.encode(list(texts), convert_to_numpy=True, show_progress_bar=False)
        return _finite(np.asarray(vectors, dtype=np.float32), f"the sentence-transformers model {self.name!r}")


class _CausalLM:
    """Means of a causal LM's last hidden states over a text's tokens; the weights are loaded when it is first asked."""

    def __init__(self, folder: str) -> None:
        self.folder = folder

    @cached_property
    def model(self) -> Any:
        import torch
        from transformers import AutoModel

        model, found = self._read(AutoModel, dtype=torch.float32, use_safetensors=True, output_loading_info=True)
        if missing := sorted(found["missing_keys"]):
            raise DataError(
                f"the causal LM {self.folder!r} lacks {len(missing)} tensors, the first {missing[0]}",
                "give a whole checkpoint",
            )
        return model.eval().to("cuda" if torch.cuda.is_available() else "cpu")

    @cached_property
    def tokenizer(self) -> Any:
        from transformers import AutoTokenizer

        return self._read(AutoTokenizer)

    def _read(self, kind: Any, **options: Any) -> Any:
        from transformers.utils import logging

        logging.disable_progress_bar()
        try:
            return kind.from_pretrained(self.folder, local_files_only=True, **options)
        except MemoryError:
            raise
        except Exception as error:  # a damaged checkpoint makes transformers fail in every way there is
            reason = str(error).strip().partition("\n")[0] or type(error).__name__
            raise DataError(
                f"cannot load the causal LM {self.folder!r}: {reason}", "give a whole Hugging Face checkpoint directory"
            ) from error

    def __call__(self, texts: Sequence[str]) -> np.ndarray:
        import torch

        tokens = self.tokenizer(list(texts), verbose=False)["input_ids"]
        most = min(MOST_TOKENS, getattr(self.model.config, "max_position_embeddings", None) or MOST_TOKENS)
        if cut := sum(len(ids) > most for ids in tokens):
            warnings.warn(f"{cut} of {len(texts)} texts are cut to their first {most} tokens", stacklevel=3)
        vectors = np.zeros((len(texts), self.model.config.hidden_size), dtype=np.float32)
        for rows in _batches([min(len(ids), most) for ids in tokens]):
            kept = [torch.tensor(tokens[row][:most]) for row in rows]
            ids = torch.nn.utils.rnn.pad_sequence(kept, batch_first=True).to(self.model.device)
            there = torch.nn.utils.rnn.pad_sequence([torch.ones_like(row) for row in kept], batch_first=True)
            there = there.to(ids.device)
            with torch.inference_mode():
                states = self.model(input_ids=ids, attention_mask=there, use_cache=False).last_hidden_state.float()
            mean = (states * there[..., None]).sum(dim=1) / there.sum(dim=1, keepdim=True)
            vectors[rows] = mean.cpu().numpy()
        return _finite(vectors, f"the causal LM {self.folder!r}")


def _finite(vectors: np.ndarray, model: str) -> np.ndarray:
    """The same vectors; `DataError` where a value is not finite."""
    if not np.isfinite(vectors).all():
        raise DataError(f"{model} gives vectors that are not finite", "give another checkpoint")
    return vectors


def _batches(lengths: Sequence[int]) -> Iterator[list[int]]:
    """Rows in batches of like length, none of length 0, each of at most `BATCH_TOKENS` with its padding."""
    batch: list[int] = []
    for row in sorted(range(len(lengths)), key=lambda row: -lengths[row]):
        if not lengths[row]:
            break
        if batch and (len(batch) + 1) * lengths[batch[0]] > BATCH_TOKENS:
            yield batch
            batch = []
        batch.append(row)
    if batch:
        yield batch
