"""Tests of kvm_bindings: the ABI, the decoding of exits, the error sentences."""
