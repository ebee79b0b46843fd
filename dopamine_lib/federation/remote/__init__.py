"""Algorithm 1 between machines over gRPC: one port at the server, which hospitals dial; it never calls a hospital."""
