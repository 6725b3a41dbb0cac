"""The schemes, one file each. vmm.machine.schemes says which comes first, and when it serves."""
