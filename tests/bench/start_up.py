"""How long `pyvmm --private-mem` takes from exec to the guest's first words, and how much memory
pyvmm itself needs.

    python tests/bench/start_up.py [--runs 15]

The clock starts before the process is made and stops when the payload's first byte is on the
pipe; its first instruction ran shortly before. Memory is read when the payload has printed its
last line: resident anonymous and file-backed pages, without the guest's (which are RssShmem).
"""

from __future__ import annotations

import argparse
import os
import re
import statistics
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
COMMAND = [sys.executable, "-m", "vmm", "--private-mem"]
BANNER = b"pyvmm payload: RAM"


def run_once(options: list[str]) -> tuple[float, int]:
    """Seconds to the first byte of the banner, and KiB of pyvmm's own memory at the peak seen."""
    read_end, write_end = os.pipe()
    start = time.perf_counter()
    with subprocess.Popen(
        [*COMMAND, *options], cwd=ROOT, stdin=subprocess.DEVNULL, stdout=write_end
    ) as process:
        os.close(write_end)
        output = os.read(read_end, 65536)
        seconds = time.perf_counter() - start
        memory = 0
        while True:
            try:
                memory = max(memory, own_memory(process.pid))
            except FileNotFoundError:
                break
            more = os.read(read_end, 65536)
            if not more:
                break
            output += more
    os.close(read_end)
    if process.returncode != 0 or not output.startswith(BANNER):
        raise SystemExit(f"the run failed with status {process.returncode}: {output!r}")
    return seconds, memory


def own_memory(pid: int) -> int:
    """RssAnon + RssFile in KiB; 0 once the process has let go of its memory."""
    status = Path(f"/proc/{pid}/status").read_text()
    return sum(int(kib) for kib in re.findall(r"^Rss(?:Anon|File):\s+(\d+) kB", status, re.M))


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure start-up time and memory.")
    parser.add_argument("--runs", type=int, default=15)
    options, rest = parser.parse_known_args()
    run_once(rest)  # the page cache is warm from here on
    results = [run_once(rest) for _ in range(options.runs)]
    times = sorted(seconds * 1000 for seconds, _ in results)
    quarters = statistics.quantiles(times, n=4)
    print(
        f"exec to first guest output, {options.runs} runs: median {statistics.median(times):.0f} "
        f"ms, quartiles {quarters[0]:.0f} to {quarters[2]:.0f}, "
        f"range {times[0]:.0f} to {times[-1]:.0f}"
    )
    print(f"own memory (RssAnon + RssFile): {max(kib for _, kib in results) / 1024:.1f} MiB")


if __name__ == "__main__":
    main()
