"""Tests of vmm.boot: formats, hostile images, decompression, loading."""
