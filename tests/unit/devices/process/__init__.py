"""Tests of vmm.devices.process."""
