"""pytest in two processes, one for each core that a small machine has: `python tools/run_tests.py [pytest's options]`.

Tests keep to one thread, so a single process leaves the second core idle. Files are shared out by their size; those of
the browser stay together, since they share a server.
"""
import subprocess
import sys
import tempfile
from contextlib import ExitStack
from pathlib import Path

root = Path(__file__).resolve().parents[1]


def halves(tests: Path) -> list:
    "Two lists of test files (or folders) of about the same size in bytes"
    folders = [p for p in tests.iterdir() if any(p.glob("test_*.py"))]
    parts = [(p.stat().st_size, p) for p in tests.glob("test_*.py")]
    parts += [(sum(f.stat().st_size for f in p.glob("test_*.py")), p) for p in folders]
    out = [[0, []], [0, []]]
    for size, path in sorted(parts, reverse=True):
        half = min(out, key=lambda x: x[0])
        half[0] += size
        half[1].append(str(path))
    return [files for _, files in out if files]


def main():
    "Run both, then show what each said; the exit status is 1 if any failed"
    with ExitStack() as open_files:
        running = []
        for i, files in enumerate(halves(root / "tests")):
            log = open_files.enter_context(tempfile.TemporaryFile("w+"))
            command = [sys.executable, "-m", "pytest", "-o", f"cache_dir=.pytest_cache/{i}", *sys.argv[1:], *files]
            running.append((subprocess.Popen(command, cwd=root, stdout=log, stderr=subprocess.STDOUT), log))
        status = 0
        for process, log in running:
            status |= process.wait() != 0
            log.seek(0)
            print(log.read(), flush=True)
    sys.exit(status)


if __name__ == "__main__":
    main()
