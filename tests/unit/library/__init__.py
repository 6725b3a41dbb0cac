"""Unit tests of vmm.library."""
