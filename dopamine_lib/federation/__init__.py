"""Algorithm 1: the five settings, the hospitals, the server, and the one training function.

on one page      algorithm1
decided          options (the command line's), settings, plan (everything a run asks), schedule, bounds (what it spends)
a round          training: hospital.contribute, Aggregation.total (aggregation, transports; wires.sums), Server.step
between parties  wires (party, sums, agreement, over threads), mpi, remote (gRPC)
around it        experiment (data, model, hospitals), results, results_table, statement, run_folder
"""
