"""Secure aggregation: BFV as a textbook and in production, pairwise masks, and how updates become integers."""
