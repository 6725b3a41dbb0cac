"""Tests of vmm.cli: bad input, help, exit statuses."""
