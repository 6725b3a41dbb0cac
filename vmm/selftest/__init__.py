"""The conformance suite: what private memory has to do, tried on this host's KVM.

Cases are plain functions, one behaviour each; every case runs in every cell of the matrix of
schemes and backings. `pyvmm selftest` runs them, and so does pytest (tests/conformance).
"""
