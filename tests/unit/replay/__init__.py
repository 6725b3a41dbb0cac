"""Tests of vmm.replay."""
