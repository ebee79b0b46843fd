"""Algorithm 1 between parties that exchange bytes, whatever carries them: threads, MPI, or gRPC."""
