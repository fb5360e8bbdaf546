"""How much memory a call takes at its peak, measured."""

from collections.abc import Callable
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile


def peak_bytes(call: Callable[[], object], device: torch.device) -> int:
    """Most bytes of tensors that exist at once during the call, beyond those before it.

    On a GPU by its allocator's count; on a CPU from torch's profiler, which sees every tensor that is made or freed.
    """
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        call()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        call()
    profiler: Any = recorded.profiler
    events = sorted(
        (event for event in profiler.kineto_results.events() if event.name() == "[memory]"),
        key=lambda event: event.start_ns(),
    )
    held = most = 0
    for event in events:
        held += event.nbytes()
        most = max(most, held)
    return most
