"""Networks, their embedded weights, and how models and checkpoints are kept in files."""
