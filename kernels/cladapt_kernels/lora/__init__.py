"""The LoRA linear: its implementations, of which `routes` chooses one, and the kernels that some are made of."""

from cladapt_kernels.lora.linear import lora_linear, lora_linear_dequantised

__all__ = ["lora_linear", "lora_linear_dequantised"]
