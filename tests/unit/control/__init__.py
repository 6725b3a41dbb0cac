"""Tests of vmm.control."""
