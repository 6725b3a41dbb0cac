"""Guest memory as a file: what reads and writes mean, the place, the mount."""
