"""A frozen base cut over the processes (FSDP2): each keeps a share of every layer, and has a layer whole while it runs.

Adapters, embedding, final norm and head stay whole on every process: they are small, or their rows are picked.
"""

from typing import TYPE_CHECKING, Any, cast

import torch

from cladapt import ranks
from cladapt.errors import ConfigError
from cladapt.model.adapter import adapted_lm

if TYPE_CHECKING:
    from peft import PeftModel


def refuse_one_process() -> None:
    """`ConfigError` where there are no processes to cut a base over."""
    if ranks.ranks() == 1:
        raise ConfigError(
            "sharding=full cuts the base over several processes, this is one",
            "start several: torchrun --nproc-per-node N $(which cladapt) train ..., or use sharding=none",
        )


def shard_base(model: "PeftModel", device: torch.device) -> None:
    """Cut the frozen weights of every decoder layer over the processes, and move the model to `device`.

    A layer is moved whole and then cut, so that the device never holds more than one beside the shares: 1 / processes
    of the layers, embedding and head. Values and gradients are those of the whole base.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    ranks.start()
    lm = adapted_lm(model)
    backbone = cast(Any, getattr(lm, lm.base_model_prefix))
    cut = {p for layer in backbone.layers for p in layer.parameters() if not p.requires_grad}
    whole = {p for p in model.parameters() if p not in cut}
    for tensor in (*whole, *model.buffers()):
        tensor.data = tensor.data.to(device)
    mesh = init_device_mesh(device.type, (ranks.ranks(),))
    # the backbone comes last and has nothing to share out: under one root a layer is fetched while another runs
    for module in (*backbone.layers, backbone):
        fully_shard(module, mesh=mesh, reshard_after_forward=True, ignored_params=whole)


def is_cut(tensor: torch.Tensor) -> bool:
    """Whether this process holds a share of the tensor only."""
    from torch.distributed.tensor import DTensor

    return isinstance(tensor, DTensor)
