"""Ranges, events and errors: what every other room builds on."""
