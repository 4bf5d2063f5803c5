"""All pages and all tests, two processes at a time: `python tools/run_tests.py [pytest's options]`.

A small machine has two cores, and pages and tests keep to one thread: more threads than cores makes both of them crawl.
Whichever process is done takes the next part, the largest ones first, so that neither core waits for the other.
"""
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path

root = Path(__file__).resolve().parents[1]
LAST = 60  # lines of a part that failed, shown again where a reader of a long log begins: at its end
PARTS = 10  # of the test files: more cost more imports, fewer leave a core idle at the end


def pages(nbs: Path) -> dict:
    "Folders of notebooks and nbdev_test's options for each: of the topmost its own pages only"
    folders = [p for p in sorted(nbs.iterdir()) if p.name[0] not in "._" and any(p.glob("*.ipynb"))]
    return {str(p): [] for p in folders} | {str(nbs): ["--skip_folder_re", "."]}


def tests(folder: Path) -> list:
    "Lists of test files, about equal in bytes; folders go first and stay whole: the browser's share a server"
    out = [[0, []] for _ in range(PARTS)]
    for path in sorted(folder.glob("test_*.py"), key=lambda p: p.stat().st_size, reverse=True):
        part = min(out, key=lambda x: x[0])
        part[0] += path.stat().st_size
        part[1].append(str(path))
    folders = [[str(p)] for p in folder.iterdir() if any(p.glob("test_*.py"))]
    return folders + [files for _, files in out if files]


def commands(options: list) -> list:
    "What is run, each in a process of its own"
    tool = str(Path(sys.executable).parent / "nbdev_test")
    out = [[tool, "--path", p, "--n_workers", "0", "--timing", *more] for p, more in pages(root / "nbs").items()]
    pytest = [sys.executable, "-m", "pytest", *options]
    return out + [[*pytest, "-o", f"cache_dir=.pytest_cache/{i}", *p] for i, p in enumerate(tests(root / "tests"))]


def run(command: list) -> tuple:
    "Its exit status, and a text: which part it was, the seconds that it took, all it said"
    start = time.monotonic()
    one_thread = os.environ | {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}  # a second one never waits busily
    said = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    done = subprocess.run(command, check=False, cwd=root, env=one_thread, **said)
    of = " ".join(str(Path(c).relative_to(root)) for c in command[1:] if c.startswith(f"{root}{os.sep}"))
    return done.returncode, f"== {of}: {time.monotonic() - start:.0f} s, exit status {done.returncode}\n{done.stdout}"


def main():
    "Show what each part said as soon as it is done, those that failed once more at the end; exit status 1 if any did"
    bad = []
    with ThreadPoolExecutor(2) as pool:
        jobs = [pool.submit(run, c) for c in commands(sys.argv[1:])]
        try:
            for job in as_completed(jobs):
                failed, said = job.result()
                bad += [said] if failed else []
                print(said, flush=True)
        except KeyboardInterrupt:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    for said in bad:
        print("\n".join(["", "failed " + said.splitlines()[0], *said.splitlines()[1:][-LAST:]]), flush=True)
    sys.exit(bool(bad))


if __name__ == "__main__":
    main()
