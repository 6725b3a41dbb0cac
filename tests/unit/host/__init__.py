"""Tests of vmm.host."""
