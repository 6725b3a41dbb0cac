"""`python -m vmm` is `pyvmm`."""

from vmm.cli.main import entry_point

if __name__ == "__main__":
    entry_point()
