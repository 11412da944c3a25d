"""The product's engine: branches, training, and OMEGA 21."""
