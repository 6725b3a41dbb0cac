"""Tests of vmm.conversion: the transaction, bad requests, rollback, races."""
