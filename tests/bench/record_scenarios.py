"""Records what stock kernels do, for vmm/scenario/data: one lab machine, a guest for each workload.

    python tests/bench/record_scenarios.py [--only NAME,...] [--models] [--out vmm/scenario/data]

Each guest is recorded with --trace; the part of the trace from the workload's start to its end is
compacted (vmm.scenario.recording) and written as NAME.json.gz. Boots are recorded whole. With
--models the cost models of models.json are made anew, too: the lab's hosts, and this machine's
/dev/kvm where there is one.
"""

from __future__ import annotations

import argparse
import base64
import json
import os
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from vmm.bench import network
from vmm.bench.linux import until_prompt
from vmm.bench.processes import environment, pyvmm
from vmm.scenario.recording import of_trace
from vmm.trace.cost import Line, learn, requests_of
from vmm.trace.reader import Trace

DATA = Path(__file__).resolve().parents[2] / "vmm" / "scenario" / "data"
KERNELS = ("debian:6.1", "debian:6.12", "debian:7.3")
SESSION_SECONDS = 150.0
LAB_SECONDS = 500.0
RUNS = 3
"""Runs of the payload, from the quickest of which a host's cost model is learnt."""


class Workload(NamedTuple):
    """`work`: lines for the guest's shell, the recorded part; none: all of the boot. `before`:
    lines that come before it."""

    name: str
    kernel: str
    summary: str
    words: tuple[str, ...] = ("--private-mem",)
    before: tuple[str, ...] = ()
    work: tuple[str, ...] = ()


_FIO = (
    "/fio/run --name=x --filename=/dev/vda --rw=rand{} --bs=4k --iodepth=16 --ioengine=libaio "
    "--direct=1 --number_ios={} --gtod_reduce=1 --minimal >/dev/null"
)
_REBIND = (
    "for i in 1 2 3 4 5; do for d in /sys/bus/pci/drivers/virtio-pci/0*; do n=${d##*/}; "
    "echo $n >/sys/bus/pci/drivers/virtio-pci/unbind; "
    "echo $n >/sys/bus/pci/drivers/virtio-pci/bind; done; done"
)
_NETWORK = (
    f"nc {network.HOST} GIVES </dev/null | head -c 262144 | wc -c",
    f"head -c 262144 /dev/zero | nc {network.HOST} TAKES",
)
WORKLOADS = (
    *(
        Workload(f"debian-{name.partition(':')[2]}-boot", name, "from power-on to power-off")
        for name in KERNELS
    ),
    Workload(
        "driver-rebind", "debian:6.12", "virtio-pci unbound from two disks and bound, 5 times",
        work=(_REBIND,),
    ),
    Workload(
        "fio-random", "debian:6.12", "fio: 1000 random reads, 1000 writes of 4 KiB, depth 16",
        # Once ahead, so that fio itself needn't be read from its disk any more.
        before=("mkdir /fio && mount -t ext4 -o ro /dev/vdb /fio", _FIO.format("read", 1)),
        work=(_FIO.format("read", 1000), _FIO.format("write", 1000)),
    ),
    Workload(
        "network", "debian:6.12", "TCP: 256 KiB to the guest, 256 KiB from it",
        words=("--private-mem", "--net", f"tap={network.INTERFACE},mac={network.MAC}"),
        before=(
            f"ip addr add {network.GUEST}/24 dev eth0 && ip link set eth0 up",
            f"echo | nc {network.HOST} TAKES",  # addresses are resolved then
        ),
        work=_NETWORK,
    ),
    Workload(
        "balloon-requests", "debian:6.12", "an ordinary guest inflates its balloon to 64 MiB",
        words=("--balloon", "size=64M"), before=("sleep 10",),
    ),
)  # fmt: skip


def record(
    load: Workload, kernel: str, initrd: str, fio: str, peer: network.Peer, env: dict[str, str]
) -> bytes:
    """Inside the lab machine: run one guest; the recording's bytes. RuntimeError where the
    guest's shell did not do as it was told."""
    folder = Path(tempfile.mkdtemp())
    disk = folder / "disk.img"
    with open(disk, "wb") as file:
        file.truncate(64 << 20)
    words = ["--kernel", kernel, "--initrd", initrd, "--append", "quiet", *load.words]
    words += ["--disk", str(disk), "--disk", f"{fio},ro", "--trace", str(folder / "trace")]
    with subprocess.Popen(
        pyvmm(*words), env=env, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    ) as process:  # fmt: skip
        assert process.stdin is not None and process.stdout is not None
        out, into = process.stdout.fileno(), process.stdin.fileno()

        def do(line: str) -> None:
            line = line.replace("GIVES", str(peer.gives)).replace("TAKES", str(peer.takes))
            os.write(into, line.encode() + b" && echo $((40 + 2))\n")
            said = until_prompt(out, SESSION_SECONDS)
            if b"\n42\r" not in said:
                raise RuntimeError(f"{load.name}: the shell did not do {line!r}: {said!r}")

        try:
            until_prompt(out, SESSION_SECONDS)
            for line in load.before:
                do(line)
            began = time.time()
            for line in load.work:
                do(line)
            ended = time.time()
            os.write(into, b"poweroff -f\n")
            while os.read(out, 1 << 16):
                pass
            process.wait(SESSION_SECONDS)
        finally:
            process.kill()
    with closing(Trace(str(folder / "trace"))) as trace:
        start = trace.facts["started"]
        span = (int((began - start) * 1e9), int((ended - start) * 1e9)) if load.work else (0, None)
        facts = {
            "summary": load.summary,
            "kernel": load.kernel,
            "scheme": trace.facts.get("scheme"),
            "host": "lab-svm",
            "by": "tests/bench/record_scenarios.py",
        }
        return of_trace(trace, facts, *span).dump()


def inner(names: list[str], fio: str, files: list[str]) -> None:
    """Runs inside the lab machine: each recording goes to stdout as a line of JSON."""
    kernels = dict(zip(KERNELS, zip(files[::2], files[1::2], strict=True), strict=True))
    env = environment()  # once: it compiles pyvmm anew
    with ExitStack() as stack:
        peer = stack.enter_context(network.peer())
        for load in WORKLOADS:
            if load.name not in names:
                continue
            started = time.monotonic()
            try:
                kernel, initrd = kernels[load.kernel]
                data = record(load, kernel, initrd, fio, peer, env)
                print(json.dumps([load.name, base64.b64encode(data).decode()]), flush=True)
            except Exception as error:
                print(f"{load.name}: {error!r}", file=sys.stderr, flush=True)
                continue
            took = time.monotonic() - started
            print(f"{load.name}: {len(data)} bytes, {took:.0f} s", file=sys.stderr, flush=True)


def outer(names: list[str], out: Path) -> None:
    """On the host: one lab machine for all of them."""
    from vmm.lab.interpreter import executable
    from vmm.lab.machine import Lab
    from vmm.lab.options import LabOptions
    from vmm.lab.progress import Reporter

    lab = Lab(LabOptions(time_limit=LAB_SECONDS), Reporter())
    words = [str(executable()), "-m", "tests.bench.record_scenarios", "--inner", ",".join(names)]
    words.append(str(lab.fio_image()))
    for name in KERNELS:
        kernel = lab.guest_kernel(name)
        words += [str(kernel.image), str(lab.guest_initramfs(kernel))]
    with lab.start(words, program=True) as run:
        run.errors.sink = lambda data: print(data.decode(), end="", file=sys.stderr, flush=True)
        status = run.wait()
        output = bytes(run.stdout.data).decode()
    for name, data in map(json.loads, output.splitlines()):
        (out / f"{name}.json.gz").write_bytes(base64.b64decode(data))
        print(f"{name}.json.gz")
    if status:
        raise SystemExit(f"the lab's command ended with status {status}")


# -- cost models ----------------------------------------------------------------------------------

HOSTS = {
    "kvm-interpreted": ("/dev/kvm without VT-x or SVM: KVM interprets kernel mode", None),
    "lab-svm": ("the lab's stock host: KVM on emulated SVM, scheme cbit", "stock"),
    "lab-attributes": ("the lab's sw-protected host: KVM memory attributes", "sw-protected"),
    "lab-in-place": ("the lab's experimental host: in-place conversion", "experimental"),
}
SCHEMES = {"lab-attributes": "attributes", "lab-in-place": "in-place"}


def model_of(name: str) -> dict[str, Any]:
    """The model that the quickest of several runs of the payload gives."""
    summary, host = HOSTS[name]
    models = []
    for number in range(RUNS):
        folder = Path(tempfile.mkdtemp()) / "trace"
        lab = [] if host is None else ["lab", "--lab-quiet", "--host", host]
        words = [*lab, "--private-mem", "--trace", str(folder)]
        if name in SCHEMES:
            words += ["--scheme", SCHEMES[name]]
        command = [sys.executable, "-m", "vmm", *words]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL, timeout=300)
        with closing(Trace(str(folder))) as trace:
            models.append(learn(trace, requests_of(trace)))
            scheme = trace.facts.get("scheme")
        print(f"{name}, run {number + 1}: {models[-1]}", file=sys.stderr)

    # What else the machine does makes a run slower, never quicker.
    best = min(models, key=lambda each: each.share.cost(4096) + each.unshare.cost(4096))

    def short(value: float) -> float:
        return float(f"{value:.6g}")

    def line(of: Line) -> dict[str, float]:
        fixed, per_byte, requests, sizes = of
        return {
            "fixed": short(fixed), "per_byte": short(per_byte), "requests": requests,
            "sizes": sizes,
        }  # fmt: skip

    return {
        "summary": summary,
        "made": f"the quickest of {RUNS} traced runs of the payload (record_scenarios.py)",
        "scheme": scheme,
        "share": line(best.share),
        "unshare": line(best.unshare),
        "nothing_ns": short(best.nothing),
        "nothing_requests": best.idle,
    }


def models(names: list[str], out: Path) -> None:
    """Make these hosts' models anew in models.json; the others stay."""
    file = out / "models.json"
    content: dict[str, Any] = json.loads(file.read_text()) if file.exists() else {"models": {}}
    for name in names:
        content["models"][name] = model_of(name)
        file.write_text(json.dumps(content, indent=1) + "\n")


def main() -> None:
    if sys.argv[1:2] == ["--inner"]:
        inner(sys.argv[2].split(","), sys.argv[3], sys.argv[4:])
        return
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", type=lambda text: text.split(","))
    parser.add_argument("--models", action="store_true")
    parser.add_argument("--out", type=Path, default=DATA)
    options = parser.parse_args()
    if options.models:
        models(options.only or list(HOSTS), options.out)
    else:
        outer(options.only or [load.name for load in WORKLOADS], options.out)


if __name__ == "__main__":
    main()
