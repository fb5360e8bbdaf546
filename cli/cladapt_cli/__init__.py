"""Command line of cladapt: argument parsing and rendering only."""
