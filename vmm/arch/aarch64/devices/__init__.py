"""Devices that only an arm64 board has, behind the buses' protocol."""
