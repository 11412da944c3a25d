"""OMEGA 21 on a borrowed GPU: the worker there, the client here, and the protocol between them."""
