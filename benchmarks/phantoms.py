"Phantoms: images a second at 128 px on one core, every kind."

import time

import cv2

from benchmarks.common import Row
from medsketch.phantoms import PHANTOMS, phantom

COUNT, TARGET = 40, 40


def rate(kind):
    "Images a second of CPU time, OpenCV held to one thread"
    phantom(kind, 128, 0)
    start = time.process_time()
    for seed in range(COUNT):
        phantom(kind, 128, seed)
    return COUNT / (time.process_time() - start)


def rows(peak: float) -> list[Row]:
    "One row per kind; not convolution, so not scaled by the machine's peak"
    threads = cv2.getNumThreads()
    cv2.setNumThreads(1)
    try:
        return [
            Row(f'phantom {kind} 128 px', rate(kind), 'images/s', TARGET, 'one core', more=True) for kind in PHANTOMS
        ]
    finally:
        cv2.setNumThreads(threads)
