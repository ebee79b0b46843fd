"""Algorithm 1 between processes over MPI: rank 0 is the server, ranks 1 to K are the hospitals."""
