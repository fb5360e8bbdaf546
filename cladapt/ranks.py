"""Several processes of one command, as `torchrun` starts them: which one this is, and what they tell each other.

All run the same code on the same inputs; the first alone writes and speaks. For one process everything here does
nothing. Objects travel pickled between the processes of one run, never to a file.
"""

import os
import sys
from collections.abc import Callable
from contextlib import suppress
from datetime import timedelta
from typing import TYPE_CHECKING, TypeVar

from cladapt.errors import ConfigError, EnvironmentProblem

if TYPE_CHECKING:
    from accelerate import Accelerator

T = TypeVar("T")

UNSUPPORTED = {
    "ACCELERATE_USE_FSDP": "FSDP",
    "ACCELERATE_USE_DEEPSPEED": "DeepSpeed",
    "ACCELERATE_USE_MEGATRON_LM": "Megatron-LM",
    "ACCELERATE_USE_PARALLELISM_CONFIG": "a parallelism configuration",
}
"""Variables by which accelerate's launcher says that a model is to be cut."""

NUMBERS = ("RANK", "LOCAL_RANK", "WORLD_SIZE")
LAUNCH = (*NUMBERS, "MASTER_ADDR", "MASTER_PORT")
"""What torchrun and accelerate's launcher tell each process."""

MPI = ("PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE")


def ranks() -> int:
    """How many processes run this command."""
    return max(1, _number("WORLD_SIZE")) if "RANK" in os.environ else 1


def rank() -> int:
    """Which of them this is, from 0."""
    return _number("RANK") if ranks() > 1 else 0


def _number(name: str) -> int:
    text = os.environ.get(name, "")
    return int(text) if text.isdecimal() else 0


def check() -> None:
    """Refuse an environment that asks for other processes than are counted here.

    Accelerate reads more of it than launchers set, and would wait for others or go apart from them without a word.
    `ConfigError` where it asks for a base cut over processes: every process must hold it whole.
    """
    for variable, name in UNSUPPORTED.items():
        if os.environ.get(variable, "false").lower() in ("1", "true", "yes", "on", "y", "t"):
            raise ConfigError(
                f"{variable}={os.environ[variable]}: {name} cuts the base into parts, which is not supported",
                "use torchrun, or `accelerate launch --multi_gpu`: every process then holds the base whole",
            )
    given = {name: os.environ[name] for name in LAUNCH if name in os.environ}
    strange = [name for name in NUMBERS if name in given and not given[name].isdecimal()]
    lacking = [name for name in LAUNCH if name not in given]
    if strange or (lacking and ("LOCAL_RANK" in given or _number("WORLD_SIZE") > 1)):
        wrong = f"{', '.join(strange)} is no number" if strange else f"{', '.join(lacking)} is not set"
        raise EnvironmentProblem(
            f"the environment announces several processes, but {wrong}: {given}",
            f"start several with torchrun; for one process: env {' '.join(f'-u {n}' for n in NUMBERS)} cladapt ...",
        )
    started = [name for name in MPI if _number(name) > 1]
    if started and ranks() == 1 and not _cuda():  # on GPUs accelerate does not look at these
        raise EnvironmentProblem(
            f"{started[0]}={os.environ[started[0]]}: processes that MPI starts do not find each other",
            f"start several with torchrun; for one process: env -u {started[0]} cladapt ...",
        )


def _cuda() -> bool:
    import torch

    return torch.cuda.is_available()


def is_main() -> bool:
    """Whether this process writes and speaks."""
    return rank() == 0


def start() -> None:
    """Join the other processes: gloo on CPUs, nccl on GPUs, as training does, which then finds the group made."""
    check()
    if ranks() == 1:
        return
    import torch
    from accelerate import PartialState

    gpus = torch.cuda.device_count()
    if _cuda() and _number("LOCAL_RANK") >= gpus:
        raise EnvironmentProblem(
            f"process {_number('LOCAL_RANK') + 1} of this machine finds {gpus} GPU{'s' * (gpus > 1)}",
            f"start one process for each: torchrun --nproc-per-node {gpus}",
        )
    # the first process may work alone for long; where one dies, its launcher ends the others
    PartialState(cpu=not _cuda(), timeout=timedelta(days=1))


def leave(code: int) -> None:
    """End this process with `code` if it is one of several; a process that is alone returns.

    The interpreter is not taken down: threads of gloo may still hold tensors of the last exchange, and letting go of
    them then aborts the process (https://github.com/pytorch/pytorch/pull/179291).
    """
    if ranks() == 1:
        return
    torch = sys.modules.get("torch")
    # after a failure the others may be gone, and leaving them in order could wait for ever
    if code == 0 and torch is not None and torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError):  # nobody reads it any more
            stream.flush()
    os._exit(code)


def accelerator() -> "Accelerator":
    """Accelerate as the training loop uses it: data parallelism alone, whatever else it is configured for."""
    start()
    from accelerate import Accelerator
    from accelerate.utils import GradientAccumulationPlugin

    # the loop has an autocast and an accumulation of its own
    once_per_step = GradientAccumulationPlugin(num_steps=1)
    made = Accelerator(cpu=not _cuda(), mixed_precision="no", gradient_accumulation_plugin=once_per_step)
    if (made.device.type == "cuda") != _cuda():
        raise ConfigError(
            f"accelerate is configured for {made.device.type}, models go to a GPU where there is one",
            "configure it for GPUs, or hide them: CUDA_VISIBLE_DEVICES=",
        )
    return made


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


def other_ended(error: BaseException) -> bool:
    """Whether this is what a process sees when another of them ends in the middle of an exchange."""
    if ranks() == 1 or not isinstance(error, RuntimeError):
        return False
    from torch.distributed import DistError

    return isinstance(error, DistError) or "gloo" in str(error)


def first_to_fail(report: Callable[[], int]) -> int:
    """`report()` of the process that comes here first; the others wait for it and take its exit code.

    A failure on one rank breaks what the others are doing, and a mistake fails on all: either way it is reported once.
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
    except (DistError, KeyError, ValueError):  # no store, or it is gone: reported twice is better than not at all
        return report()
    code = report()
    store.set(f"{key}/code", str(code))
    return code
