"""Tests of vmm.lab that boot no machine."""
