"""Tests of vmm.wiring."""
