"""Prepares an archive of 10,000 small files: time, memory, and a kill in the middle.

python benchmarks/speed/prepare_archive.py [--files 10000]
"""

from __future__ import annotations

import argparse
import os
import resource
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from discovr_monai.phantom.cine import encode_avi, simulate_cine

JOB = """
import resource, sys
from discovr_monai.data.archive.prepare import prepare
if __name__ == "__main__":
    counts = prepare(sys.argv[1], sys.argv[2], size=64, progress=False)
    own = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    worker = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024
    print(f"{counts['kept']} kept, {counts.total() - counts['kept']} set aside; "
          f"peak memory {own:.0f} MB here, {worker:.0f} MB in a worker")
"""


def main() -> None:
    """Writes the archive, starts, kills, goes on."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--files", type=int, default=10_000)
    count = parser.parse_args().files
    with tempfile.TemporaryDirectory() as place:
        root = Path(place)
        for i in range(20):
            encode_avi(simulate_cine(i, num_frames=16, size=64).frames, 50, root / f"{i}.avi")
        archive = root / "archive"
        for i in range(count):
            folder = archive / f"case {i // 50}"
            folder.mkdir(parents=True, exist_ok=True)
            (folder / f"{i}.avi").write_bytes((root / f"{i % 20}.avi").read_bytes())
        job = root / "job.py"
        job.write_text(JOB)
        command = [sys.executable, str(job), str(archive), str(root / "out")]
        start = time.monotonic()
        first = subprocess.Popen(command, start_new_session=True)
        time.sleep(15)
        os.killpg(first.pid, signal.SIGKILL)
        first.wait()
        done = len(list((root / "out").glob("cines/*/*.npy")))
        print(f"killed after 15 s: {done} of {count} are done")
        said = subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()
        seconds = time.monotonic() - start
        print(f"the same command again: {said}")
        print(f"{seconds:.0f} s in all, {count / seconds:.0f} files/s on {os.cpu_count()} cores")
        again = time.monotonic()
        subprocess.run(command, check=True, capture_output=True)
        print(f"and once more, with nothing to do: {time.monotonic() - again:.0f} s")
        peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024
        print(f"peak of any process: {peak:.0f} MB")


if __name__ == "__main__":
    main()
