"""All benchmarks, one after the other: `python -m benchmarks` (or `make bench`)."""

import subprocess
import sys

MODULES = (
    ["benchmarks.ngram"],
    ["benchmarks.planning"],
    ["benchmarks.deciding"],
    ["benchmarks.import_memory", "--gib", "1"],
    ["benchmarks.loading"],
    ["benchmarks.cache"],
    ["benchmarks.tasks"],
    ["benchmarks.processes"],
    ["benchmarks.growth"],
    ["benchmarks.peers"],
)

if __name__ == "__main__":
    for module in MODULES:
        print(f"\n$ python -m {' '.join(module)}", flush=True)
        if code := subprocess.run([sys.executable, "-m", *module], check=False).returncode:
            sys.exit(code)
