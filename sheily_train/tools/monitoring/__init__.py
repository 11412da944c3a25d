"""Views over the run log: terminal, plain lines, experiment trackers."""
