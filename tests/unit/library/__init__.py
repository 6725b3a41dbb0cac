"""Tests of vmm.library."""
