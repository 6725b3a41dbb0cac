"""Builds the cffi extension `kvm_bindings._kvm`; run as a script it builds it in place.

    python kvm_bindings/build.py

It holds what every architecture has and what this machine's has. For another one:

    python kvm_bindings/build.py --machine aarch64 --compiler aarch64-linux-gnu-gcc \\
        --python-include DIR --output DIR

The compilation happens in a temporary directory: in the project's root, whose layout is flat,
setuptools would try to discover packages and give up.
"""

from __future__ import annotations

import argparse
import os
import platform
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Sequence
from contextlib import redirect_stdout
from pathlib import Path

from cffi import FFI
from ioctl_opt import IO, IOC, IOC_READ, IOC_WRITE

HERE = Path(__file__).resolve().parent
MACHINES = sorted(header.parent.name for header in HERE.glob("*/kvm_abi.h"))
"""What there are declarations for, by platform.machine()'s names."""

COMPILER_OPTIONS = ["-O2", "-Wall", "-Wextra", "-Wno-unused-parameter"]

LIMITED_API = not sysconfig.get_config_var("Py_GIL_DISABLED")
"""One extension for every CPython from 3.11 on. A free-threaded one has no limited API (before
3.15), and gets an extension of its own."""

PRELUDE = """
#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif
#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>
"""

_KVMIO = 0xAE
REQUESTS = {
    "PYVMM_IO": IO(_KVMIO, 0),
    "PYVMM_IOR": IOC(IOC_READ, _KVMIO, 0, 0),
    "PYVMM_IOW": IOC(IOC_WRITE, _KVMIO, 0, 0),
    "PYVMM_IOWR": IOC(IOC_READ | IOC_WRITE, _KVMIO, 0, 0),
    "PYVMM_IOC_SIZE": IOC(0, 0, 0, 1),
}
"""What kvm_bindings.requests makes numbers of. Here and not there: importing ioctl-opt takes 2 ms
of every start, for it needs ctypes."""

FUNCTIONS = """
int pyvmm_ioctl_value(int fd, unsigned long request, unsigned long value);
int pyvmm_ioctl_pointer(int fd, unsigned long request, void *argument);
int64_t pyvmm_map(int fd, uint64_t offset, uint64_t size, int protection, int flags);
int pyvmm_unmap(uint64_t address, uint64_t size);
int pyvmm_forget(uint64_t address, uint64_t size);
int pyvmm_protect(uint64_t address, uint64_t size, int protection);
int pyvmm_fallocate(int fd, int mode, uint64_t offset, uint64_t size);
int64_t pyvmm_pread_to_address(int fd, uint64_t address, uint64_t size, uint64_t offset);
int64_t pyvmm_pwrite_from_address(int fd, uint64_t address, uint64_t size, uint64_t offset);
int64_t pyvmm_cached_pages(int fd, uint64_t offset, uint64_t size);
int pyvmm_memfd_secret(unsigned int flags);
int pyvmm_forbid_core_dumps(void);
int pyvmm_interrupt_by(int number);
"""

DATAPATH = """
int64_t pyvmm_pread_many(int fd, const void *table, uint32_t count, char *data);
int64_t pyvmm_pwrite_many(int fd, const void *table, uint32_t count, const char *data);
int64_t pyvmm_move_many(int from, int to, const void *table, uint32_t count, char *buffer,
                        uint64_t buffer_size, int pipe_out, int pipe_in, uint64_t splice_from,
                        uint64_t most);
void pyvmm_copy_memory(uint64_t target, uint64_t source, uint64_t size);
"""

VIRTQUEUE = """
int64_t pyvmm_indirect_tables(const void *ring, const void *table, uint32_t size, uint32_t first,
                              uint32_t count, uint32_t most, uint64_t *pieces, uint32_t *tables);
int64_t pyvmm_chains(const void *ring, const void *table, uint32_t size, uint32_t first,
                     uint32_t count, const void *indirect, uint64_t indirect_size,
                     uint32_t most_descriptors, uint64_t most_bytes, uint64_t *chains,
                     uint64_t room, uint64_t *totals);
uint32_t pyvmm_disk_headers(const uint64_t *chains, uint32_t count, uint64_t *pieces);
void pyvmm_disk_plan(const uint64_t *chains, uint32_t count, const void *headers, uint64_t limit,
                     int may_write, uint64_t each, uint64_t most, uint64_t *reads,
                     uint64_t *writes, uint64_t *statuses, uint32_t *elements,
                     uint64_t *plan);
"""

MAPPED = """
int64_t pyvmm_copy_mapped(const void *table, uint32_t count, char *data, int writing);
int64_t pyvmm_move_mapped(int fd, uint64_t memory, uint64_t room, const void *table, uint32_t count,
                          int writing, uint64_t most);
int64_t pyvmm_probe_mapped(const void *addresses, uint32_t count, char *reached);
int pyvmm_is_copied(int fd);
"""

SANDBOX = """
int pyvmm_syscall_number(const char *name);
uint32_t pyvmm_audit_arch(void);
int pyvmm_no_new_privileges(void);
int pyvmm_seccomp(const void *filter, uint32_t count, int all_threads);
int pyvmm_landlock_abi(void);
int pyvmm_landlock_ruleset(uint64_t files, uint64_t network, uint64_t scoped);
int pyvmm_landlock_allow(int ruleset, uint64_t files, int parent);
int pyvmm_landlock_restrict(int ruleset);
int pyvmm_no_core_files(void);
"""

FLOORS = """
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


def _require_known(machine: str) -> None:
    """Raises SystemExit with one line for a machine that there are no declarations for."""
    if machine not in MACHINES:
        raise SystemExit(
            f"kvm_bindings: no KVM declarations for {machine}, only for {' and '.join(MACHINES)}; "
            "pyvmm doesn't run there"
        )


def _interface(machine: str) -> FFI:
    """What cffi makes the extension from: declarations, functions and their sources."""
    _require_known(machine)
    abi = "".join(f"#define {name} {value:#x}\n" for name, value in REQUESTS.items())
    abi += (HERE / "kvm_abi.h").read_text() + (HERE / machine / "kvm_abi.h").read_text()
    ffi = FFI()
    ffi.cdef(abi + FUNCTIONS + DATAPATH + VIRTQUEUE + MAPPED + SANDBOX + FLOORS)
    parts = (
        "bindings.c", f"{machine}/abi_sizes.c", "datapath.c", "virtqueue.c", "mapped.c",
        "sandbox.c", "floors.c",
    )  # fmt: skip
    source = PRELUDE + abi + "".join((HERE / part).read_text() for part in parts)
    ffi.set_source(
        "kvm_bindings._kvm",
        source,
        py_limited_api=LIMITED_API,
        extra_compile_args=COMPILER_OPTIONS,
    )
    return ffi


def require_compiler() -> None:
    """Raises SystemExit with one line where there is no C compiler, or no Python.h."""
    words = shlex.split(os.environ.get("CC") or sysconfig.get_config_var("CC") or "cc")
    if not words or shutil.which(words[0]) is None:
        raise SystemExit(
            f"pyvmm: its extension is C, and there is no compiler {words[0] if words else 'cc'}; "
            "install one (Debian: apt install gcc; Fedora: dnf install gcc), or set CC"
        )
    header = Path(sysconfig.get_path("include"), "Python.h")
    if not header.is_file():
        raise SystemExit(
            f"pyvmm: its extension is C, and there is no {header}; install Python's headers "
            "(Debian: apt install python3-dev; Fedora: dnf install python3-devel)"
        )


def compile_extension(destination: Path) -> Path:
    """Compiles the extension for this machine and puts it into `destination`; the file's path.

    Raises SystemExit with one line where there is no C compiler, and for a machine without
    declarations; cffi.VerificationError where the compiler fails.
    """
    ffi = _interface(platform.machine())
    require_compiler()
    with tempfile.TemporaryDirectory(prefix="pyvmm-build-") as scratch:
        return _put(Path(ffi.compile(tmpdir=scratch)), destination)


def cross_compile(
    machine: str, compiler: str, python_includes: Sequence[Path], destination: Path
) -> Path:
    """Compiles the extension for another machine, with a compiler that makes its code.

    `python_includes` are the folders of Python.h and pyconfig.h; the machine's Python may be any
    from 3.11 on (the limited API). Raises SystemExit with one line: an unknown machine, no such
    compiler, or what it didn't like.
    """
    ffi = _interface(machine)
    with tempfile.TemporaryDirectory(prefix="pyvmm-build-") as scratch:
        source, built = Path(scratch, "_kvm.c"), Path(scratch, "_kvm.abi3.so")
        with redirect_stdout(sys.stderr):  # cffi says what it does
            ffi.emit_c_code(str(source))
        includes = [f"-I{folder}" for folder in python_includes]
        options = ["-shared", "-fPIC", *COMPILER_OPTIONS, *includes]
        try:
            subprocess.run([compiler, *options, "-o", str(built), str(source)], check=True)
        except FileNotFoundError:
            raise SystemExit(f"kvm_bindings: there is no compiler {compiler}") from None
        except subprocess.CalledProcessError as error:
            raise SystemExit(
                f"kvm_bindings: {compiler} failed with status {error.returncode}; is Python.h of "
                "Python 3.11 or later in the folder of --python-include?"
            ) from None
        return _put(built, destination)


def _put(built: Path, destination: Path) -> Path:
    """Replaced, not rewritten: a running pyvmm may have the old file mapped."""
    target = destination / built.name
    staging = destination / f".{built.name}.new"
    shutil.copyfile(built, staging)
    staging.chmod(0o755)
    staging.replace(target)
    return target


def main() -> None:
    parser = argparse.ArgumentParser(description="Compiles kvm_bindings' extension.")
    parser.add_argument("--machine", default=platform.machine(), help="what to compile for")
    parser.add_argument("--compiler", help="a C compiler for that machine")
    parser.add_argument(
        "--python-include",
        type=Path,
        action="append",
        default=[],
        metavar="DIR",
        help="where that machine's Python.h and pyconfig.h are; may be given several times",
    )
    parser.add_argument("--output", type=Path, default=HERE, metavar="DIR", help="where to put it")
    given = parser.parse_args()
    if given.compiler is not None:
        built = cross_compile(given.machine, given.compiler, given.python_include, given.output)
    elif given.machine == platform.machine():
        built = compile_extension(given.output)
    else:
        _require_known(given.machine)
        parser.error(f"--machine {given.machine} on a {platform.machine()} needs --compiler")
    print(built)


if __name__ == "__main__":
    main()
