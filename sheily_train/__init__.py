"""Sheily Train: one specialist model per knowledge domain, trained on what you have, with nothing lost."""

__version__ = "0.1.0"
