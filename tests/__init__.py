"""Tests: unit (no KVM), kvm (this machine's), lab (full emulation), bench, and their support."""
