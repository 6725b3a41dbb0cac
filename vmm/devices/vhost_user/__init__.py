"""The front end of vhost-user: virtio devices whose queues another process serves.

That process (qemu-storage-daemon, virtiofsd) maps the shared side of guest memory and works on the
rings there by itself; pyvmm keeps the registers, and what the two sides have to agree on.
Specification: docs/interop/vhost-user.rst of QEMU.
"""
