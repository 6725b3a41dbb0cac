"""Devices connected to KVM: interrupts and queue notifications behind eventfds, PCI slots."""
