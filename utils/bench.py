"""What the benchmark scripts share: clocks, CUDA graphs, measured ceilings, flags, a table."""

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Iterable

import torch


def synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def host_us(run: Callable) -> float:
    """Microseconds of `run` on the host's clock, the device drained before and after."""
    synchronize()
    begin = time.perf_counter()
    run()
    synchronize()
    return (time.perf_counter() - begin) * 1e6


def device_us(run: Callable, ahead: bool = False) -> float:
    """Microseconds of `run` between CUDA events, without CUDA on the host's clock.

    With `ahead` the host enqueues all of it while the device is still busy, so that no launch is waited for.
    """
    if not torch.cuda.is_available():
        return host_us(run)
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    synchronize()
    if ahead:
        torch.cuda._sleep(500_000)  # cycles
    begin.record()
    run()
    end.record()
    synchronize()
    return begin.elapsed_time(end) * 1e3


def capture(run: Callable, name: str) -> Callable | None:
    """The replay of a CUDA graph of `run`, which has run before; None, with a line on stderr, where that fails."""
    if not torch.cuda.is_available():
        return None
    graph, stream = torch.cuda.CUDAGraph(), torch.cuda.Stream()
    try:
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            run()
        synchronize()
        with torch.cuda.graph(graph, stream=stream):
            run()
        graph.replay()
        synchronize()
    except RuntimeError as error:
        print(f"{name}: no CUDA graph: {' '.join(str(error).split())[:200]}", file=sys.stderr)
        return None
    return graph.replay


def measure_ceilings(dtype: torch.dtype, repeats: int = 10) -> dict[str, float]:
    """Rates of a device copy, bytes read and written, and of a large square matrix product."""
    device, size, n = ("cuda", 2**30, 8192) if torch.cuda.is_available() else ("cpu", 2**20, 128)
    source, target = torch.ones(2, size, dtype=torch.uint8, device=device)
    matrix = torch.randn(n, n, dtype=dtype, device=device)
    rates = {}
    for name, run, work in (
        ("copy_TBps", lambda: target.copy_(source), 2 * size),
        ("matmul_TFLOPs", lambda: matrix @ matrix, 2 * n**3),
    ):
        times = [device_us(run, ahead=True) for _ in range(3 + repeats)][3:]
        rates[name] = work / statistics.median(times) / 1e6
    return rates


def count(text: str) -> int:
    """An argparse type: a whole number of at least 1."""
    if not (text.isdecimal() and int(text) >= 1):
        raise argparse.ArgumentTypeError(f"{text!r}: must be a whole number of at least 1")
    return int(text)


def sizes(*names: str) -> Callable[[str], list[tuple[int, ...]]]:
    """An argparse type: with names "batch" and "slots", 1x1024,32x1024 is [(1, 1024), (32, 1024)]; "" is none."""

    def parse(text: str) -> list[tuple[int, ...]]:
        parts = [part.split("x") for part in text.split(",")] if text else []
        if not all(len(part) == len(names) and all(n.isdecimal() and int(n) >= 1 for n in part) for part in parts):
            form = "x".join(names)
            raise argparse.ArgumentTypeError(f"{text!r}: must be {form},{form},… in whole numbers of at least 1")
        return [tuple(map(int, part)) for part in parts]

    return parse


def print_table(rows: Iterable[dict], columns: dict[str, str]) -> None:
    """`columns` maps a key of the rows to the format of its values; "-" where a row has none."""
    cells = [list(columns)]
    for row in rows:
        cells.append(["-" if row.get(key) is None else format(row[key], spec) for key, spec in columns.items()])
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    for line in cells:
        print("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip())
