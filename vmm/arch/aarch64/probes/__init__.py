"""Behaviour probes of what only arm64 has, see vmm.host.probes."""
