"""OMEGA 21: the network that learns from vectors of 1600 numbers."""
