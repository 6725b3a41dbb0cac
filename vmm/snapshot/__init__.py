"""A machine's state in a folder, and its shared memory as an ELF core file."""
