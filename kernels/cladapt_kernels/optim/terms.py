"""A proximal term strength R of parameters v with anchors a, and the figures of a step with one: torch alone.

kl      R = sum_groups KL(softmax(v / tau) || softmax(a / tau))
l2      R = 1/2 ||v - a||^2
fisher  R = 1/2 sum_i f_i (v_i - a_i)^2
"""

import importlib.util
import operator
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

KINDS = ("kl", "l2", "fisher")
_version = operator.attrgetter("_version")


@dataclass(frozen=True)
class Term:
    """strength R, which pulls parameters towards `anchors`; the anchors must stay as they are."""

    kind: str
    """`kl`, `l2` or `fisher`."""
    strength: float | Tensor
    """A 0-d tensor where a CUDA graph is to change it."""
    anchors: Sequence[Tensor]
    """One of each parameter's shape and dtype."""
    inverse_tau: Tensor | None = None
    """[G], of `kl`; 1 without."""
    fisher: Sequence[Tensor] | None = None
    """Like the anchors."""
    groups: Sequence[int] | None = None
    """The group of each parameter, 0 to G - 1; each parameter its own without."""

    def group_of_each(self, count: int) -> list[int]:
        """The group of each of `count` parameters."""
        return [*range(count)] if self.groups is None else [*self.groups]

    def check(self, parameters: Sequence[Tensor]) -> None:
        """`ValueError` where this term does not fit the parameters."""
        if self.kind not in KINDS:
            raise ValueError(f"term {self.kind!r}, expected one of {', '.join(KINDS)}")
        if self.kind == "fisher" and self.fisher is None:
            raise ValueError("term 'fisher' without its diagonal")
        for name, tensors in (("anchors", self.anchors), ("fisher", self.fisher)):
            if tensors is None:
                continue
            if len(tensors) != len(parameters):
                raise ValueError(f"{len(tensors)} {name} for {len(parameters)} parameters")
            for index, (tensor, parameter) in enumerate(zip(tensors, parameters, strict=True)):
                found, wanted = ((t.device, t.dtype, tuple(t.shape)) for t in (tensor, parameter))
                if found != wanted or not tensor.is_contiguous():
                    given, expected = (" ".join(map(str, facts)) for facts in (found, wanted))
                    raise ValueError(f"{name}[{index}] is {given}, expected {expected}, contiguous")
        for index, parameter in enumerate(parameters):
            if not parameter.is_contiguous() or not parameter.numel():
                raise ValueError(f"parameter {index} is empty or not contiguous")
        groups = self.group_of_each(len(parameters))
        if len(groups) != len(parameters) or {*groups} != {*range(max(groups, default=0) + 1)}:
            raise ValueError(f"groups {groups[:8]}…, expected numbers from 0 without a gap, {len(parameters)} of them")
        if self.inverse_tau is not None and self.inverse_tau.shape != (max(groups) + 1,):
            raise ValueError(f"inverse_tau is {tuple(self.inverse_tau.shape)}, expected {(max(groups) + 1,)}")


def check_kind(parameters: Sequence[Tensor]) -> None:
    """`ValueError` where a term cannot pull parameters of these dtypes on these devices."""
    kinds = {(p.dtype, p.device) for p in parameters}
    if len(kinds) > 1 or parameters[0].dtype not in (torch.float32, torch.float64):
        found = ", ".join(sorted(f"{dtype} on {device}" for dtype, device in kinds))
        raise ValueError(f"parameters are {found}; a term needs float32 or float64, of one kind on one device")


def launch_obstacle(parameters: Sequence[Tensor]) -> str:
    """Why no launch of `adamw` works on these parameters, empty where one does."""
    device, dtype = parameters[0].device, parameters[0].dtype
    if device.type != "cuda":
        return f"no kernels on {device.type}"
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    return "" if dtype == torch.float32 else f"no kernel in {dtype}"


def versions(tensors: Iterable[Tensor]) -> list[int]:
    """How often each was written in place, as autograd counts."""
    return list(map(_version, tensors))  # of hundreds, at every step: no bytecode


class Figures(NamedTuple):
    """Of a step before it is done, each a [] on the device; `clip` is what the step multiplies by."""

    norm: Tensor
    """||g + t||, the norm that is clipped, t the term's gradient."""
    task_norm: Tensor
    """||g||"""
    term_norm: Tensor
    """||t||"""
    inner: Tensor
    """<g, t>"""
    distance: Tensor
    """||v - a||"""
    term: Tensor
    """strength R"""
    clip: Tensor

    def numbers(self) -> dict[str, float]:
        """By name, waiting for the device once."""
        return dict(zip(self._fields, torch.stack([f.double() for f in self]).tolist(), strict=True))
