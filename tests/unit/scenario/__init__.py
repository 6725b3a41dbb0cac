"""Tests of vmm.scenario."""
