"""Tests of vmm.machine with a fake KVM."""
