"""Differential privacy: definitions, the Gaussian mechanism, accounting, the DP-SGD step and its randomness."""
