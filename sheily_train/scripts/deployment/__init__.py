"""What carries the worker to borrowed machines."""
