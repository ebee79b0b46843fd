"""Flower as the courier between the parties of a run: the same ends and sums as on every other wire."""
