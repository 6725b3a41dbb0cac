"""Tests of vmm.arch."""
