"""The LoRA linear: its implementations, of which `routes` chooses one, and the kernels that some are made of."""

from cladapt_kernels.lora.items import ItemFactors, item_linear
from cladapt_kernels.lora.linear import lora_linear, lora_linear_dequantised
from cladapt_kernels.lora.runs import Runs

__all__ = ["ItemFactors", "Runs", "item_linear", "lora_linear", "lora_linear_dequantised"]
