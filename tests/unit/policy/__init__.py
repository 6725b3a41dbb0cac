"""Tests of vmm.policy."""
