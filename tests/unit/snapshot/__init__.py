"""Tests of vmm.snapshot."""
