"""virtio 1.2: the split queue, the PCI transport, and a module for each device."""
