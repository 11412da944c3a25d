"""Branches: where they lie, what their rows say, and what is wrong with them. Never imports torch."""
