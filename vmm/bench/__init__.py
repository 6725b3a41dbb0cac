"""Measurements: `pyvmm bench`. Nothing that runs guests imports this."""
