"""A report of a memory of the paper's size: seconds to write, bytes, seconds to open where a browser is found.

Written twice: straight after the recording, whose rows have to come from the disk, and again from the page cache.

784-800-800-10, plain SGD, batch 128: 640,000 patterns a layer unless --patterns says otherwise; 20 queries on all
layers.

    python benchmarks/report.py [--patterns 640000] [--out DIR]
"""

from __future__ import annotations

import argparse
import shutil
import tempfile
import time
from pathlib import Path

import torch
from recorded import record

from dualhook.data import load_fashion_mnist_subset
from dualhook.demo import network

FLAGS = "--headless --no-sandbox --disable-gpu --no-first-run --disable-background-networking"


def seconds_to_open(page: Path) -> float | None:
    """From the start of navigation until everything is drawn, of the second opening in a headless Chromium."""
    chromium, driver = shutil.which("chromium"), shutil.which("chromedriver")
    try:
        from selenium import webdriver
    except ImportError:
        return None
    if chromium is None or driver is None:
        return None
    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    for flag in FLAGS.split():
        options.add_argument(flag)
    browser = webdriver.Chrome(options=options, service=webdriver.ChromeService(driver))
    try:
        for _ in range(2):  # the first one starts the browser's own processes
            started = time.perf_counter()
            browser.get(page.absolute().as_uri())
            browser.execute_script("return document.body.offsetHeight")
            taken = time.perf_counter() - started
        return taken
    finally:
        browser.quit()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--patterns", type=int, default=640_000)
    parser.add_argument("--out", type=Path, help="keep memory and report here")
    arguments = parser.parse_args()
    folder = arguments.out or Path(tempfile.mkdtemp(prefix="dualhook-report-"))
    data = load_fashion_mnist_subset()
    try:
        torch.manual_seed(0)
        model = network()
        memory = record(model, folder / "memory", arguments.patterns, layers=["fc1", "fc2", "fc3"], batch=128)
        print(f"{'patterns a layer':<28}{memory.patterns('fc1'):>12,}")
        for rows_are in ("on disk", "in the page cache"):
            started = time.perf_counter()
            page = memory.report(
                model,
                data.test_images[:20],
                folder / "report.html",
                images=data.train_images,
                labels=data.test_labels[:20],
                classes=data.classes,
            )
            print(f"{f'20 queries, {rows_are}':<30}{time.perf_counter() - started:>10.1f} s")
        print(f"{'bytes':<28}{page.stat().st_size / 1e6:>12.2f} MB")
        opened = seconds_to_open(page)
        print(f"{'opened in Chromium':<28}" + ("   no browser" if opened is None else f"{opened:>12.2f} s"))
    finally:
        if arguments.out is None:
            shutil.rmtree(folder)


if __name__ == "__main__":
    main()
