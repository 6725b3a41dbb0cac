"""Tests of vmm.devices.vhost_user."""
