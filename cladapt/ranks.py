"""Several processes of one command, as `torchrun` starts them: which one this is, and what they tell each other.

All run the same code on the same inputs; the first alone writes and speaks. For one process everything here does
nothing. Objects travel pickled between the processes of one run, never to a file.
"""

import os
from collections.abc import Callable
from datetime import timedelta
from typing import TypeVar

T = TypeVar("T")


def ranks() -> int:
    """How many processes run this command."""
    return int(os.environ.get("WORLD_SIZE", "1")) if "RANK" in os.environ else 1


def rank() -> int:
    """Which of them this is, from 0."""
    return int(os.environ["RANK"]) if ranks() > 1 else 0


def is_main() -> bool:
    """Whether this process writes and speaks."""
    return rank() == 0


def start() -> None:
    """Join the other processes: gloo on CPUs, nccl on GPUs, as training does, which then finds the group made."""
    if ranks() == 1:
        return
    import torch
    from accelerate import PartialState

    # the first process may work alone for long; where one dies, its launcher ends the others
    PartialState(cpu=not torch.cuda.is_available(), timeout=timedelta(days=1))


def once(make: Callable[[], T]) -> T:
    """`make()` of the first process, for all of them; the others wait for it."""
    if ranks() == 1:
        return make()
    from torch.distributed import broadcast_object_list

    start()
    box = [make() if is_main() else None]
    broadcast_object_list(box, src=0)
    return box[0]  # type: ignore[return-value]  # filled on every rank


def gather(value: T) -> list[T]:
    """The values of all processes, by rank."""
    if ranks() == 1:
        return [value]
    from torch.distributed import all_gather_object

    start()
    found: list[T] = [value] * ranks()
    all_gather_object(found, value)
    return found


def first_to_fail(report: Callable[[], int]) -> int:
    """`report()` of the process that comes here first; the others wait for it and take its exit code.

    A failure on one rank breaks what the others are doing, and a mistake fails on all: either way it is told once.
    """
    if ranks() == 1:
        return report()
    from torch.distributed import DistError, TCPStore

    try:
        address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        store = TCPStore(address, port, is_master=False, timeout=timedelta(minutes=1))
        key = f"cladapt/failure/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}"
        earlier = store.add(f"{key}/count", 1) - 1
        if earlier:
            return int(store.get(f"{key}/code"))
    except DistError:  # whoever kept the store is gone: twice told is better than not at all
        return report()
    code = report()
    store.set(f"{key}/code", str(code))
    return code
