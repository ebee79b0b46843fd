"""Benchmarks: what the kit costs. Each figure stands beside a peer's, measured in the same run."""
