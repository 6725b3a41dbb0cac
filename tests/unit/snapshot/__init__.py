"""Snapshots: their folder, and core files."""
