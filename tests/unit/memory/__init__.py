"""Tests of vmm.memory: backings, GuestMemory, transfers; and that nothing is dereferenced."""
