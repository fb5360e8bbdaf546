"""Gradient rectification: steps of many LoRA factors at once that leave protected inputs alone."""

from cladapt_kernels.rectify.options import Form, Gauge
from cladapt_kernels.rectify.rectifier import Rectifier, rectify

__all__ = ["Form", "Gauge", "Rectifier", "rectify"]
