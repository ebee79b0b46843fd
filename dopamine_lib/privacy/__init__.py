"""Differential privacy: accounting, the DP-SGD step, and the randomness both stand on."""
