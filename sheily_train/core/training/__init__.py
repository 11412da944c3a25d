"""Training: from a request to a specialist, its metrics and its run log."""
