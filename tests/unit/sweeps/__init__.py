"""Tests of vmm.sweeps."""
