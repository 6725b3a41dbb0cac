"""Tests that need no KVM and take seconds, in the rooms of the code they are about."""
