"""Benchmarks: what the kit costs, each figure beside a peer measured in the same run."""
