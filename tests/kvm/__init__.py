"""Tests on this machine's /dev/kvm; skipped, with the reason, where there is none."""
