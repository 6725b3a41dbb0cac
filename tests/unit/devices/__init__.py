"""Tests of vmm.devices from the outside, as a guest drives them."""
