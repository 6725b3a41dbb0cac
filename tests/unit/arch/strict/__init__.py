"""Tests of strict guests, without KVM."""
