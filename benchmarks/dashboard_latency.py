"""How long the page takes, in a real Chromium: to open, and from a key press to all pictures drawn.

Run it with the project's environment: ``python benchmarks/dashboard_latency.py`` (about five
minutes, 2 GB of disk). Two folders of three runs each are made up first: a small one (300 steps, 12
matrices) and a large one (10,000 steps, 100 matrices), with spectra every tenth step, and full
matrices every tenth or hundredth.

- *First plot*: from asking for the address until the first picture is drawn / until all eight are:
  cold, with a server just started; new, with a warm server and a browser that has never seen the
  page and must compile plotly.js first; again, with both warm.
- *Key press*: ten recorded steps on or back, so that every picture of one step changes. The clock
  starts at the event's own time and stops when the last picture in the window is drawn.
- *Live ticks*: a recording grows, the page looks every 150 ms; the browser's heap after a garbage
  collection, and the server's memory.
"""

from __future__ import annotations

import argparse
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from playwright.sync_api import Browser, Page, sync_playwright

from normuon_lens.runfile import Matrices, Matrix, Writer

RUNS = {"AdamW": (200.0, 0.28), "Muon": (2.0, 0.29), "NorMuon": (3.0, 0.05)}
"""Condition number and spread of the neuron norms of what is made up."""
EVERY = 10
WINDOW = {"width": 1440, "height": 1000}
PANELS = 8
SERVE = (
    "import sys; from normuon_lens.dashboard import layout; layout.LIVE_EVERY = {every};"
    "from normuon_lens.cli.main import main; sys.exit(main(sys.argv[1:]))"
)
WATCH = """() => {
  window.seen = [];
  document.addEventListener("keydown", (event) => seen.push(["key", event.timeStamp]), true);
  for (const graph of document.querySelectorAll(".graph")) {
    graph.firstElementChild.on("plotly_afterplot", () => seen.push([graph.id, performance.now()]));
  }
}"""
IN_SIGHT = """() => [...document.querySelectorAll(".graph")].filter((graph) => {
  const { top, bottom } = graph.getBoundingClientRect();
  return top < innerHeight && bottom > 0;
}).map((graph) => graph.id)"""
DRAWN = "document.querySelectorAll('.graph[data-drawn]').length"
IDLE = "!document.body.hasAttribute('aria-busy')"


class Opening(NamedTuple):
    """Seconds until the first picture and until all of them."""

    first: float
    all: float


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--moves", type=int, default=50, help="key presses (default: 50)")
    parser.add_argument("--ticks", type=int, default=200, help="live ticks (default: 200)")
    parser.add_argument("--openings", type=int, default=5, help="warm openings (default: 5)")
    asked = parser.parse_args()
    chromium = shutil.which("chromium") or sys.exit("no Chromium here: apt install chromium")
    with tempfile.TemporaryDirectory() as folder, sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        medians = []
        head = f"{'first plot / all, s':<42}{'cold':>13}{'new':>13}{'again':>13}"
        print(f"{head}{'key p50':>10}{'p95':>8}")
        for name, steps, blocks, keep in (("small", 300, 2, 10), ("large", 10_000, 17, 100)):
            place = Path(folder) / name
            count = make(place, steps, blocks, keep)
            told = f"{name}: {steps} steps, {count} matrices, 3 runs"
            with served(place) as (address, _):
                cold, page = opened(browser, address)
                warm = [closed(*opened(browser, address)) for _ in range(asked.openings)]
                again = [timed(page, page.reload) for _ in range(asked.openings)]
                moves = pressed(page, asked.moves)
                page.context.close()
            medians.append(statistics.median(moves))
            print(
                f"{told:<42}{seconds([cold])}{seconds(warm)}{seconds(again)}"
                f"{medians[-1]:>7.0f} ms{np.percentile(moves, 95):>5.0f} ms"
            )
        print(f"latency, large over small: {medians[1] / medians[0]:.2f}x")
        grow(browser, Path(folder) / "live", asked.ticks)
        browser.close()


def make(folder: Path, steps: int, blocks: int, keep: int) -> int:
    """Write three runs and return the number of their matrices."""
    folder.mkdir()
    table = matrices(blocks)
    for seed, (optimizer, (condition, spread)) in enumerate(RUNS.items()):
        path = folder / f"{optimizer.lower()}.h5"
        writer = Writer(path, {"optimizer": optimizer, "name": optimizer}, table)
        rng = np.random.default_rng(seed)
        for step in range(1, steps + 1):
            write(writer, table, rng, step, condition, spread, keep)
        writer.close()
    return len(table)


def matrices(blocks: int) -> Matrices:
    """Return those of a small GPT, one hundred at most."""
    shapes = []
    for block in range(blocks):
        shapes += [(f"blocks.{block}.attn.{name}", 32, 32) for name in "qkvo"]
        shapes += [(f"blocks.{block}.mlp.up", 128, 32), (f"blocks.{block}.mlp.down", 32, 128)]
    return Matrices([Matrix(*shape) for shape in shapes[:100]])


def write(
    writer: Writer,
    table: Matrices,
    rng: np.random.Generator,
    step: int,
    condition: float,
    spread: float,
    keep: int = EVERY,
) -> None:
    """Write one step."""
    norms = np.abs(1 + spread * rng.standard_normal(table.total_rows))
    scalars = {"loss": 4 / np.sqrt(step) + 0.05 * rng.standard_normal()}
    writer.step(step, time.time(), scalars=scalars, norms={"update": norms})
    if step == 1 or step % EVERY == 0:
        least = condition * rng.uniform(0.8, 1.2)
        sigma = np.concatenate([np.geomspace(1, 1 / least, matrix.k) for matrix in table])
        writer.spectra("update", step, sigma, np.full(len(table), 1e-9))
    if step == 1 or step % keep == 0:
        for i, matrix in enumerate(table):
            writer.matrix("update", i, step, rng.standard_normal((matrix.m, matrix.n)))


@contextmanager
def served(folder: Path, every: int = 1500) -> Iterator[tuple[str, int]]:
    """Serve in a process of its own; yield the address and its process id."""
    command = [sys.executable, "-c", SERVE.format(every=every), "dashboard", str(folder)]
    with subprocess.Popen(
        [*command, "--no-browser", "--port", "0"], stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        try:
            yield process.stdout.readline().split()[0], process.pid
        finally:
            process.terminate()


def opened(browser: Browser, address: str) -> tuple[Opening, Page]:
    """Open the page in a window without a memory; return what it took, and the page."""
    page = browser.new_context(viewport=WINDOW).new_page()
    return timed(page, partial(page.goto, address)), page


def timed(page: Page, go: Callable[..., Any]) -> Opening:
    """Return how long it takes from going there until the pictures are drawn."""
    start = time.monotonic()
    go(wait_until="commit")
    first = until(page, f"{DRAWN} > 0") - start
    return Opening(first, until(page, f"{DRAWN} >= {PANELS}") - start)


def seconds(openings: Sequence[Opening]) -> str:
    """Return the medians of some openings."""
    first, full = (statistics.median(part) for part in zip(*openings, strict=True))
    return f"{first:>6.2f} /{full:>5.2f}"


def closed(opening: Opening, page: Page) -> Opening:
    """Close the page."""
    page.context.close()
    return opening


def until(page: Page, holds: str, seconds: float = 300.0) -> float:
    """Wait until an expression holds in the page; return the time."""
    deadline = time.monotonic() + seconds
    while not page.evaluate(holds):
        assert time.monotonic() < deadline, f"never: {holds}"
        time.sleep(0.01)
    return time.monotonic()


def pressed(page: Page, moves: int) -> list[float]:
    """Press keys and return the milliseconds that each took."""
    until(page, IDLE)
    page.evaluate(WATCH)
    in_sight = set(page.evaluate(IN_SIGHT))
    taken = []
    for move in range(moves):
        page.evaluate("seen.length = 0")
        page.keyboard.press("PageUp" if move < moves / 2 else "PageDown")
        time.sleep(0.4)  # as a reader would look, and all that is out of sight is drawn too
        until(page, IDLE)
        events: list[Any] = page.evaluate("seen")
        pressed_at = next(when for what, when in events if what == "key")
        taken.append(max(when for what, when in events if what in in_sight) - pressed_at)
    return taken


def grow(browser: Browser, folder: Path, ticks: int) -> None:
    """Let a recording grow under the page's eyes; print what memory does."""
    folder.mkdir()
    table, rng = matrices(2), np.random.default_rng(0)
    writer = Writer(folder / "live.h5", {"optimizer": "Muon", "name": "live"}, table)
    for step in range(1, 31):
        write(writer, table, rng, step, 2.0, 0.3)
    writer.commit()
    with served(folder, every=150) as (address, pid):
        _, page = opened(browser, address)
        heaps, servers = [], []
        for tick in range(ticks):
            step = int(page.evaluate("lens.known.newest"))
            write(writer, table, rng, step + 1, 2.0, 0.3)
            writer.commit()
            until(page, f"lens.known.newest > {step} && {IDLE}")
            if tick % (ticks // 4) == ticks // 4 - 1:
                heaps.append(heap(page))
                servers.append(resident(pid))
        page.context.close()
    writer.close()
    shown = ", ".join(f"{value:.1f}" for value in heaps)
    print(f"heap of the page over {ticks} live ticks: {shown} MB (after each quarter)")
    print(f"memory of the server: {', '.join(f'{value:.0f}' for value in servers)} MB")


def heap(page: Page) -> float:
    """Return the page's JavaScript heap in MB, after a garbage collection."""
    session = page.context.new_cdp_session(page)
    session.send("HeapProfiler.collectGarbage")
    used = session.send("Runtime.getHeapUsage")["usedSize"]
    session.detach()
    return float(used) / 1e6


def resident(pid: int) -> float:
    """Return the resident memory of a process in MB."""
    lines: Sequence[str] = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1e3 for line in lines if line.startswith("VmRSS"))


if __name__ == "__main__":
    main()
