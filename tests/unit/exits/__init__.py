"""Tests of vmm.exits with hand-made exits."""
