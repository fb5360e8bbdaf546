"""Kernels compiled ahead of time, without a GPU: `python -m cladapt_kernels.aot` writes what every variant takes."""
