"""The command: `python -m vmm`, and the console script `pyvmm`."""

# What `signal` is made of: importing that takes milliseconds, for its enumerations.
import _signal  # type: ignore[import-not-found]

if _signal.getsignal(_signal.SIGINT) is _signal.default_int_handler:
    # While the rest is being imported, Ctrl-C ends the process and shows nobody a traceback.
    _signal.signal(_signal.SIGINT, _signal.SIG_DFL)

from vmm.cli.main import entry_point

if __name__ == "__main__":
    entry_point()
