"""Weights that can be trusted: every number finite, and the file the one that was written.

A tensor is read once for both: its least and greatest value say whether all are finite, its bytes go into the hash.
"""

import hashlib
import math
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

from cladapt.artifacts import read_json
from cladapt.errors import DataError

WEIGHTS = "model.safetensors"


def weights_hash(model: nn.Module) -> str:
    """Hash of every tensor of a model: names, shapes, dtypes and bytes."""
    return _hash(sorted(model.state_dict().items()))


def saved_weights_hash(folder: Path, model: nn.Module, hint: str) -> str | None:
    """`weights_hash` of the model as it lies in `folder`, whatever the dtype it was loaded in, one tensor at a time.

    `model` is what was loaded from there: it names the tensors, and stands for those that transformers saves under
    other names; None where it cannot, being loaded in another dtype. `DataError` with `hint` for a number that is not
    finite. Costs 1.2 s of one core per GB, half of it SHA-256.
    """
    loaded = sorted(model.state_dict(keep_vars=True).items())
    with ExitStack() as opened:
        place: dict[str, tuple[Path, Any]] = {}
        for file in _weight_files(folder):
            handle = opened.enter_context(safe_open(file, framework="pt"))
            place |= {name: (file, handle) for name in handle.keys()}  # noqa: SIM118 - no mapping
        names = {id(tensor): name for name, tensor in loaded if name in place}  # a tied head has no copy of its own
        renamed = {str(tensor.dtype) for _, tensor in loaded if id(tensor) not in names and tensor.is_floating_point()}
        if renamed and renamed - {f"torch.{read_json(folder / 'config.json').get('dtype')}"}:
            return None

        def saved() -> Iterator[tuple[str, Tensor]]:
            for name, tensor in loaded:
                file, found = folder, tensor
                if (written := names.get(id(tensor))) is not None:
                    file, handle = place[written]
                    found = handle.get_tensor(written)
                check_finite(str(file), {written or name: found}, hint)
                yield name, found

        return _hash(saved())


def _weight_files(folder: Path) -> list[Path]:
    """The files that transformers reads the weights of a checkpoint from."""
    if (folder / WEIGHTS).is_file():
        return [folder / WEIGHTS]
    return [folder / name for name in sorted(set(read_json(folder / f"{WEIGHTS}.index.json")["weight_map"].values()))]


def _hash(tensors: Iterable[tuple[str, Tensor]]) -> str:
    digest = hashlib.sha256()
    for name, tensor in tensors:
        digest.update(f"{name}{tuple(tensor.shape)}{tensor.dtype}".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()[:16]


def check_finite(where: str, tensors: Mapping[str, Tensor], hint: str) -> None:
    """`DataError` that names the first number of `tensors` that is NaN or infinite, in one pass."""
    for name, tensor in tensors.items():
        if not tensor.is_floating_point() or not tensor.numel():
            continue
        wide = tensor.detach() if tensor.element_size() > 1 else tensor.detach().float()
        if all(math.isfinite(bound.item()) for bound in wide.aminmax()):
            continue
        bad = ~wide.isfinite()
        first = bad.nonzero()[0].tolist()
        raise DataError(
            f"{where}: {int(bad.sum())} of {bad.numel()} values of {name} are not finite, the first is "
            f"{wide[tuple(first)].item()} at {first}",
            hint,
        )
