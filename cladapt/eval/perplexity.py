"""How well a language model predicts a text: what adapting it to items does to the language that it knew.

Perplexity is exp of the mean negative log-likelihood of a token, bits per byte the same of the text's bytes, which
models of different vocabularies share. Every window of WINDOW tokens is predicted by itself, after the token that opens
a text, over the whole vocabulary; what does not fill a last window is left out.
"""

import math
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import functional as F

from cladapt.artifacts import hash_file
from cladapt.errors import DataError
from cladapt.model.head import cross_entropy

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

WINDOW = 256
"""Tokens that are predicted together."""
AT_ONCE = 8
"""Windows of a batch."""


@dataclass(frozen=True)
class Text:
    """A text file: its name, content and hash."""

    name: str
    content: str
    fingerprint: str


@dataclass(frozen=True)
class Windows:
    """A text for one tokenizer: `tokens` int64 [n, WINDOW] after the token `opening`, which stand for `bytes` of it.

    `left_out`: tokens after the last whole window. `unknown`: tokens that stand for anything.
    """

    tokens: Tensor
    opening: int
    bytes: int
    left_out: int
    unknown: int


def read_text(path: Path) -> Text:
    """A text file in UTF-8; `DataError` where it is not there, is none, or is empty."""
    if not path.is_file():
        raise DataError(f"{path} is no regular file" if path.exists() else f"no such file: {path}", "give a text file")
    try:
        content = path.read_bytes().decode("utf-8")
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is no text in UTF-8: {error.reason} at byte {error.start}", "convert it") from error
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}", "check the file") from error
    if "\0" in content:
        raise DataError(f"{path} is no text: it has a zero byte", "give a text file")
    if not content.strip():
        raise DataError(f"{path} is empty", "give a text of some thousand words")
    return Text(path.name, content, hash_file(path))


def windows_of(text: Text, tokenizer: "PreTrainedTokenizerBase", ids: Collection[int] = ()) -> Windows:
    """A text as whole windows of tokens.

    `ids`: semantic-ID tokens, which must not occur. `DataError` where one does, where the text does not fill a window,
    or where the tokenizer knows none of its words.
    """
    opening = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    if opening is None:
        raise DataError("the tokenizer has neither a bos nor an eos token", "set one in its tokenizer_config.json")
    encoded: Any = tokenizer(text.content, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    tokens = torch.tensor(encoded["input_ids"], dtype=torch.int64)
    spelt = torch.isin(tokens, torch.tensor([*ids], dtype=torch.int64))
    if spelt.any():
        token = tokenizer.convert_ids_to_tokens(int(tokens[spelt][0]))
        raise DataError(f"{text.name} spells the semantic-ID token {token}", "give a text without items")
    if len(tokens) < WINDOW:
        raise DataError(f"{text.name} has {len(tokens)} tokens, a window {WINDOW}", "give a longer text")
    used = len(tokens) // WINDOW * WINDOW
    unknown = 0 if tokenizer.unk_token_id is None else int((tokens[:used] == tokenizer.unk_token_id).sum())
    if unknown == used:
        raise DataError(
            f"the base's tokenizer knows no word of {text.name}",
            "perplexity needs a base made from a pretrained model (`cladapt base init`)",
        )
    end = encoded["offset_mapping"][used - 1][1]
    covered = len(text.content[:end].encode())
    return Windows(tokens[:used].view(-1, WINDOW), int(opening), covered, len(tokens) - used, unknown)


@torch.no_grad()
def perplexity(lm: "PreTrainedModel", windows: Windows) -> dict[str, float]:
    """`perplexity` per token, and `bits_per_byte`, of a causal LM, adapters inside it or not, in evaluation mode.

    Equals exp and log2 of `F.cross_entropy(lm(tokens).logits[:, :-1], tokens[:, 1:])`, a chunk of logits at a time.
    """
    lm.eval()
    device = next(lm.parameters()).device
    backbone, head = getattr(lm, lm.base_model_prefix), lm.get_output_embeddings()
    total = torch.zeros((), dtype=torch.float64, device=device)
    for some in windows.tokens.to(device).split(AT_ONCE):
        opened = F.pad(some[:, :-1], (1, 0), value=windows.opening)
        hidden = backbone(input_ids=opened, use_cache=False).last_hidden_state.flatten(0, 1)
        total += cross_entropy(head, hidden, some.flatten()).double().sum()
    nats = float(total)
    return {
        "perplexity": math.exp(min(nats / windows.tokens.numel(), 700.0)),  # beyond, exp has no float
        "bits_per_byte": nats / math.log(2) / windows.bytes,
    }
