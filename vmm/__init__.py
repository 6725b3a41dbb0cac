"""pyvmm: a userspace virtual machine monitor for guest private memory."""
