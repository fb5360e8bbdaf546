"""What `observer` tells of kernels that only a GPU would run wrongly."""

from typing import Any

import pytest
import torch

pytest.importorskip("triton", reason="the kernels are written in triton")
import triton
import triton.language as tl

pytestmark = pytest.mark.usefixtures("observer")


@triton.jit
def _reverse(scratch, FENCED: tl.constexpr, SIZE: tl.constexpr):
    i = tl.arange(0, SIZE)
    tl.store(scratch + i, tl.load(scratch + SIZE + i))
    if FENCED:
        tl.debug_barrier()
    tl.store(scratch + SIZE + i, tl.load(scratch + SIZE - 1 - i))


@triton.jit
def _claims(x, MULTIPLE: tl.constexpr):
    place = tl.multiple_of(x + tl.arange(0, 4), MULTIPLE)
    tl.store(place, tl.load(place) + 1.0)


@triton.jit
def _square(x, PRECISION: tl.constexpr):
    own = tl.arange(0, 16)[:, None] * 16 + tl.arange(0, 16)[None, :]
    tile = tl.load(x + own)
    tl.store(x + own, tl.dot(tile, tile, input_precision=PRECISION))


@triton.jit
def _reads(x, COUNT: tl.constexpr, MOST: tl.constexpr):
    i = tl.arange(0, MOST)
    tl.store(x, tl.sum(tl.load(x + i, mask=i < COUNT, other=0.0)))


@pytest.mark.parametrize(
    ("kernel", "sound", "faulty", "start", "message"),
    [
        (_reads, {"COUNT": 260, "MOST": 512}, {"COUNT": 261, "MOST": 512}, 0, "outside of the tensors of the launch"),
        (_reverse, {"FENCED": True, "SIZE": 8}, {"FENCED": False, "SIZE": 8}, 0, "read before a barrier"),
        (_claims, {"MULTIPLE": 64}, {"MULTIPLE": 64}, 1, "is no multiple of 64"),
        (_square, {"PRECISION": "ieee"}, {"PRECISION": "tf32"}, 0, "product of float32 in TF32"),
    ],
)
def test_the_observer_tells_of_each_thing_that_it_watches(
    kernel: Any, sound: dict[str, object], faulty: dict[str, object], start: int, message: str, device: torch.device
) -> None:
    if device.type == "cuda":
        pytest.skip("it observes the interpreter")
    x = torch.zeros(260)
    kernel[(1,)](x, **sound)
    for given, named in (((x[start:],), {}), ((), {kernel.arg_names[0]: x[start:]})):
        with pytest.raises(Exception, match=message):
            kernel[(1,)](*given, **named, **faulty)
