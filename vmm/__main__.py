"""The command: `python -m vmm`, and the console script `pyvmm`."""

import signal

if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    # While the rest is being imported, Ctrl-C ends the process and shows nobody a traceback.
    signal.signal(signal.SIGINT, signal.SIG_DFL)

from vmm.cli.main import entry_point

if __name__ == "__main__":
    entry_point()
