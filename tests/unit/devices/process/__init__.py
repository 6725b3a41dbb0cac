"""Devices in processes of their own: the protocol, both sides of it, and what lies at either."""
