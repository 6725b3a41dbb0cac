"""The conformance suite (vmm.selftest) under pytest: on this host's KVM, and on the model of it."""
