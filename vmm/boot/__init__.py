"""Kernel and initrd images: identified, checked, uncompressed, moved into guest memory."""
