"""Behaviour probes: micro-guests try what a capability only promises.

Capabilities lie: there are hosts that advertise hypercall exits and never return from KVM_RUN
after one. Every micro-guest runs under a watchdog, so that a probe always ends.
"""
