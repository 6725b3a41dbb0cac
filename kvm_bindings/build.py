"""Builds the cffi extension `kvm_bindings._kvm`; run as a script it builds it in place.

    python kvm_bindings/build.py

The compilation happens in a temporary directory: in the project's root, whose layout is flat,
setuptools would try to discover packages and give up.
"""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path

from cffi import FFI

HERE = Path(__file__).resolve().parent

PRELUDE = """
#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif
#include <errno.h>
#include <fcntl.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>
"""

FUNCTIONS = """
int pyvmm_ioctl_value(int fd, unsigned long request, unsigned long value);
int pyvmm_ioctl_pointer(int fd, unsigned long request, void *argument);
int64_t pyvmm_map(int fd, uint64_t offset, uint64_t size, int protection, int flags);
int pyvmm_unmap(uint64_t address, uint64_t size);
int pyvmm_protect(uint64_t address, uint64_t size, int protection);
int pyvmm_fallocate(int fd, int mode, uint64_t offset, uint64_t size);
int64_t pyvmm_pread_to_address(int fd, uint64_t address, uint64_t size, uint64_t offset);
int64_t pyvmm_pwrite_from_address(int fd, uint64_t address, uint64_t size, uint64_t offset);
int64_t pyvmm_cached_pages(int fd, uint64_t offset, uint64_t size);
int pyvmm_memfd_secret(unsigned int flags);
"""

DATAPATH = """
int64_t pyvmm_pread_many(int fd, const void *table, uint32_t count, char *data);
int64_t pyvmm_pwrite_many(int fd, const void *table, uint32_t count, const char *data);
int64_t pyvmm_move_many(int from, int to, const void *table, uint32_t count, char *buffer,
                        uint64_t buffer_size, int pipe_out, int pipe_in, uint64_t splice_from);
"""

FLOORS = """
void pyvmm_copy_memory(uint64_t target, uint64_t source, uint64_t size);
int64_t pyvmm_floor_pread(int fd, uint64_t address, uint64_t size, uint64_t span, uint32_t count);
int64_t pyvmm_floor_pwrite(int fd, uint64_t address, uint64_t size, uint64_t span, uint32_t count);
int64_t pyvmm_floor_pread_mapped(int fd, uint64_t address, uint64_t size, uint64_t span,
                                 uint32_t count);
int64_t pyvmm_floor_memcpy(uint64_t target, uint64_t target_span, uint64_t source,
                           uint64_t source_span, uint64_t size, uint32_t count);
int64_t pyvmm_floor_splice(int from, int to, uint64_t size, uint64_t span, uint32_t count,
                           int pipe_out, int pipe_in);
int64_t pyvmm_floor_ioctl(int fd, unsigned long request, uint32_t count);
int64_t pyvmm_floor_tick_rate(uint32_t milliseconds);
"""


def compile_extension(destination: Path) -> Path:
    """Compiles the extension and puts it into `destination`; returns the file's path.

    Raises cffi.VerificationError when there is no working C compiler.
    """
    abi = (HERE / "kvm_abi.h").read_text()
    ffi = FFI()
    ffi.cdef(abi + FUNCTIONS + DATAPATH + FLOORS)
    parts = ("bindings.c", "datapath.c", "floors.c")
    source = PRELUDE + abi + "".join((HERE / part).read_text() for part in parts)
    ffi.set_source(
        "kvm_bindings._kvm",
        source,
        py_limited_api=True,
        extra_compile_args=["-O2", "-Wall", "-Wextra", "-Wno-unused-parameter"],
    )
    with tempfile.TemporaryDirectory(prefix="pyvmm-build-") as scratch:
        built = Path(ffi.compile(tmpdir=scratch))
        # Replaced, not rewritten: a running pyvmm may have the old file mapped.
        target = destination / built.name
        staging = destination / f".{built.name}.new"
        shutil.copyfile(built, staging)
        staging.chmod(0o755)
        staging.replace(target)
    return target


if __name__ == "__main__":
    print(compile_extension(HERE))
