"""Tests of vmm.core."""
