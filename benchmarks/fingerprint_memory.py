"""Memory of the fingerprint: flat over the number of cases, and what large cases take.

    python -m benchmarks.fingerprint_memory

Measures generated phantoms, each with intensities of its own (50 to 500 of them: the smaller sets are hard links to
the first of the largest), and of 400 x 512 x 512 voxels one case with nine small structures and one with a single
structure of 38 % of the volume, each set in a process of its own. The peak is that of the process's resident memory
(VmHWM, Linux), libraries included. Intensities are whole numbers, as scanners store them; the same cases with all
values different show the pool of distinct values grow to its bound.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from scipy.ndimage import gaussian_filter, zoom

from benchmarks.cells import RESULTS
from benchmarks.methods import row
from samunet.core.files import read_json, write_json
from samunet.core.geometry import Geometry
from samunet.core.log import SilentReporter
from samunet.core.volume import Volume
from samunet.datasets.raw import load_raw_dataset
from samunet.imageio import write_image, write_labels
from samunet.pipeline.provenance import describe
from samunet.planners.fingerprint import extract_fingerprint

TABLE = "fingerprint_memory"
SETS = (50, 100, 200, 500)
KINDS = ("whole numbers", "all different")
SMALL, LARGE = (10, 48, 48), (400, 512, 512)
LARGE_STRUCTURES = {"large": 9, "large_foreground": 1}


def main() -> None:
    """Measure all sets and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--measure", type=Path, help="only measure this dataset, in this process (used by the script)")
    parser.add_argument("--sets", type=int, nargs="+", default=list(SETS))
    parser.add_argument("--no-large", action="store_true", help="leave the large case out")
    parser.add_argument("--table", action="store_true", help="only print the table")
    options = parser.parse_args()
    if options.measure is not None:
        print(json.dumps(measure(options.measure)))
        return
    file = RESULTS / f"{TABLE}.json"
    if not options.table:
        with tempfile.TemporaryDirectory() as folder:
            write_json(file, run(Path(folder), options.sets, with_large=not options.no_large))
    print(table(read_json(file)))


def run(folder: Path, sets: Sequence[int], *, with_large: bool) -> dict[str, Any]:
    """Write the datasets and measure each."""
    found: dict[str, Any] = {"cases": {}}
    for index, kind in enumerate(KINDS):
        largest = write_cases(folder / kind / "Dataset999_Many", max(sets), SMALL, structures=2, whole=index == 0)
        found["cases"][kind] = {}
        for number in sorted({1, *sets}):
            linked = link_cases(largest, folder / kind / f"Dataset{number:03d}_Some", number)
            found["cases"][kind][str(number)] = in_own_process(linked)
            print(f"{number} cases, {kind}: {found['cases'][kind][str(number)]}", flush=True)
    for number, (name, structures) in enumerate(LARGE_STRUCTURES.items() if with_large else ()):
        large = write_cases(folder / f"Dataset{512 + number}_Large", 1, LARGE, structures=structures, whole=True)
        found[name] = {"shape": list(LARGE), "structures": structures, **in_own_process(large)}
        print(f"{name}: {found[name]}", flush=True)
    provenance = {name: value for name, value in describe().items() if name not in ("command", "started")}
    return found | {"small_shape": list(SMALL), "provenance": provenance}


def in_own_process(dataset: Path) -> dict[str, float]:
    """Seconds and peak memory of one fingerprint in a fresh process."""
    words = [sys.executable, "-m", "benchmarks.fingerprint_memory", "--measure", str(dataset)]
    answer = subprocess.run(words, check=True, capture_output=True, text=True)
    found: dict[str, float] = json.loads(answer.stdout.splitlines()[-1])
    return found


def measure(dataset: Path) -> dict[str, float]:
    """Fingerprint a dataset in this process."""
    raw = load_raw_dataset(dataset)
    began, used = time.monotonic(), time.process_time()
    extract_fingerprint(raw, processes=1, reporter=SilentReporter())
    status = Path("/proc/self/status").read_text().splitlines()
    peak = next(int(line.split()[1]) for line in status if line.startswith("VmHWM"))
    return {
        "seconds": round(time.monotonic() - began, 1),
        "cpu_seconds": round(time.process_time() - used, 1),
        "peak_rss_gib": round(peak / 2**20, 3),
    }


def write_cases(folder: Path, number: int, shape: tuple[int, int, int], *, structures: int, whole: bool) -> Path:
    """A dataset of ellipsoids in a row, as bright as their numbers say, under a smooth field, an offset and noise."""
    rng = np.random.default_rng(0)
    labels = ellipsoids(shape, structures)
    geometry = Geometry.from_spacing(shape, (1.5, 0.8, 0.8))
    coarse = 60 * gaussian_filter(rng.standard_normal((8, 16, 16), dtype=np.float32), 1)
    scene = zoom(coarse, np.array(shape) / coarse.shape, order=1)
    scene += np.float32(40) * labels
    for index in range(number):
        name = f"case_{index:03d}"
        image = rng.standard_normal(shape, dtype=np.float32)
        image *= 20
        image += scene
        image += np.float32(rng.uniform(0, 100))
        if whole:
            np.round(image, out=image)
        write_image(folder / "imagesTr" / f"{name}_0000.nii.gz", Volume(image[np.newaxis], geometry))
        write_labels(folder / "labelsTr" / f"{name}.nii.gz", labels, geometry=geometry)
    write_description(folder, number, structures)
    return folder


def ellipsoids(shape: tuple[int, int, int], number: int) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """Labels 1 to number on the diagonal of a volume, each an ellipsoid."""
    z, y, x = (np.linspace(0, 1, n, dtype=np.float32) for n in shape)
    labels = np.zeros(shape, np.uint8)
    radius = 0.9 / (2 * number)
    for index in range(number):
        centre = (index + 0.5) / number
        across = ((y - centre) / radius)[:, None] ** 2 + ((x - centre) / radius)[None] ** 2
        for place in np.flatnonzero(np.abs(z - centre) < radius):
            labels[place][across < 1 - ((z[place] - centre) / radius) ** 2] = index + 1
    return labels


def write_description(folder: Path, number: int, structures: int) -> None:
    """dataset.json."""
    names = {"background": 0, **{f"structure_{value}": value for value in range(1, structures + 1)}}
    content = {"channel_names": {"0": "MRI"}, "labels": names, "numTraining": number, "file_ending": ".nii.gz"}
    write_json(folder / "dataset.json", content)


def link_cases(source: Path, folder: Path, number: int) -> Path:
    """A dataset of hard links to the first cases of another."""
    for part in ("imagesTr", "labelsTr"):
        (folder / part).mkdir(parents=True)
        for file in sorted((source / part).iterdir())[:number]:
            os.link(file, folder / part / file.name)
    write_description(folder, number, len(read_json(source / "dataset.json")["labels"]) - 1)
    return folder


def table(results: dict[str, Any]) -> str:
    """Markdown: peak over the number of cases, and the large case."""
    lines = [row(["cases", "voxels each", "values", "CPU seconds", "peak RSS, GiB"]), row(["---"] * 5)]
    small = " x ".join(map(str, results["small_shape"]))
    for kind, sets in results["cases"].items():
        for number, found in sorted(sets.items(), key=lambda item: int(item[0])):
            lines.append(row([number, small, kind, found["cpu_seconds"], f"{found['peak_rss_gib']:.3f}"]))
    for large in (results[name] for name in LARGE_STRUCTURES if name in results):
        shape = f"{' x '.join(map(str, large['shape']))}, structures: {large['structures']}"
        lines.append(row([1, shape, KINDS[0], large["cpu_seconds"], f"{large['peak_rss_gib']:.3f}"]))
    return "\n".join(lines)


if __name__ == "__main__":
    main()
