"""Sweeps: many runs over policies, parameters, kernels and workloads, each result stored once."""
