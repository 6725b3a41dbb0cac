"""The files that the guest is made of, opened before the rest of the VMM is even imported.

A compressed kernel takes longer to unpack than everything else takes to get ready: its child
process starts here, first of all, so that as much as possible happens beside it.
"""

from __future__ import annotations

from vmm.core.lean_typing import TYPE_CHECKING

if TYPE_CHECKING:
    from vmm.arch.protocol import Architecture, OpenedKernel
    from vmm.boot.source import Source
    from vmm.machine.config import MachineConfig


class OpenedImages:
    """A kernel on its way to be uncompressed, and its initrd; both None for the payload.

    `config` is the given one, with what the files say of the guest's command line.
    """

    def __init__(self, architecture: Architecture, config: MachineConfig) -> None:
        """Raises ImageError (a UsageError) for what can be told from the files' headers."""
        self.config = config
        self.kernel: OpenedKernel | None = None
        self.initrd: Source | None = None
        if config.kernel is None:
            return
        from vmm.boot.source import open_source  # not on the payload's start-up path

        try:
            if config.root is None and config.execute is None:
                if config.initrd is not None:
                    self.initrd = open_source(config.initrd, "initrd")
                self.kernel = architecture.open_kernel(config.kernel)
            else:
                from vmm.machine.own_init import complete  # most runs bring all they need

                self.kernel = architecture.open_kernel(config.kernel)
                self.config, self.initrd = complete(config, architecture.name)
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Close what is open, end what runs; any number of times."""
        if self.kernel is not None:
            self.kernel.close()
        if self.initrd is not None:
            self.initrd.close()
