"""The schemes, one file each. vmm.host.choice says which comes first, and when it serves."""
