"""The LoRA linear: its ways, of which `routes` chooses one, and the kernels that some of them are made of."""

from cladapt_kernels.lora.linear import lora_linear, lora_linear_dequantised

__all__ = ["lora_linear", "lora_linear_dequantised"]
