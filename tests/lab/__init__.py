"""Tests in a machine under full emulation: stock kernels, the command as a whole."""
