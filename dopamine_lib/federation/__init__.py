"""Algorithm 1: the five settings, the hospitals, the server, and the one training function."""
