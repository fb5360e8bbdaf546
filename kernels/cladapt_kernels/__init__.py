"""Kernels of cladapt, with their plain-torch truths in `reference`; imports torch alone."""
