"""cladapt: continual low-rank adaptation of LLM-based recommenders."""

__version__ = "0.1.0"
