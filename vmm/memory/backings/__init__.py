"""The backings, one file each. vmm.machine.backings says which scheme takes which."""
