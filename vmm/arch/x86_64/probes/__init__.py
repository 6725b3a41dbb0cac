"""Behaviour probes of what only x86 has, see vmm.host.probes."""
