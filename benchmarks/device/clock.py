"""How long a call takes on a device, and on how many inputs it has to be tried for that.

CUDA: device events around calls that are all queued before anybody waits, so that neither the launch nor the wait of
the host is in the figure; calls shorter than that takes are captured in a graph and replayed. CPU: the host's clock.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

Call = Callable[[], Any]
WARM_UPS = 3
ROUNDS = 20
# What calls in turn must touch, so that none finds its inputs in the cache.
MIN_ROTATION_BYTES = 256 * 10**6
CACHES = 4
# Below this the host may not keep ahead of the device.
SHORT_MS = 0.5


def input_sets(bytes_per_call: int, device: str) -> int:
    """How many sets of inputs calls have to go through in turn: 256 MB and 4 times the L2 cache in all; on a CPU 2."""
    if device != "cuda":
        return 2
    cache = getattr(torch.cuda.get_device_properties("cuda"), "L2_cache_size", 0)
    return max(1, -(-max(MIN_ROTATION_BYTES, CACHES * cache) // max(bytes_per_call, 1)))


def events(calls: Sequence[Call], rounds: int) -> list[float]:
    """Milliseconds of each of `rounds` calls, taken in turns from `calls`, by device events."""
    marks = [torch.cuda.Event(enable_timing=True) for _ in range(2 * rounds)]
    for i in range(rounds):
        marks[2 * i].record()
        calls[i % len(calls)]()
        marks[2 * i + 1].record()
    torch.cuda.synchronize()
    return [a.elapsed_time(b) for a, b in zip(marks[::2], marks[1::2], strict=True)]


def captured(calls: Sequence[Call]) -> torch.cuda.CUDAGraph:
    """One graph of all calls, one after the other."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        calls[0]()
    torch.cuda.current_stream().wait_stream(side)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        kept = [call() for call in calls]  # each call has results of its own to write, as each has inputs of its own
    del kept
    return graph


def milliseconds(
    calls: Sequence[Call], device: str, *, rounds: int = ROUNDS, warm_ups: int = WARM_UPS, graph: bool = True
) -> tuple[float, str]:
    """Median milliseconds of one call, and how they were taken: "events", "graph", "host clock", or why no graph.

    Args:
        calls: the same work on different inputs, taken in turns.
        device: "cuda" or "cpu".
        rounds: calls, or replays of the graph of all of them.
        warm_ups: calls that are not counted.
        graph: whether a short call may be replayed from a graph; not one that waits for the device.
    """
    if device != "cuda":
        for i in range(warm_ups):
            calls[i % len(calls)]()
        return statistics.median(_host(calls[i % len(calls)]) for i in range(rounds)), "host clock"
    events(calls, warm_ups)
    median = statistics.median(events(calls, rounds))
    if not graph or median >= SHORT_MS:
        return median, "events"
    try:
        replayed = captured(calls).replay
    except RuntimeError as error:  # it waits for the device, or copies from the host
        torch.cuda.synchronize()
        return median, f"events, no graph: {str(error)[:80]}"
    events([replayed], warm_ups)
    return statistics.median(events([replayed], rounds)) / len(calls), "graph"


def _host(call: Call) -> float:
    begin = time.perf_counter()
    call()
    return (time.perf_counter() - begin) * 1e3


def seconds(call: Call, device: str) -> float:
    """Seconds of one call; on CUDA the mean of as many in a row as 20 ms hold, 20 at most, between two events."""
    if device != "cuda":
        return _host(call) / 1e3
    torch.cuda.synchronize()
    (first,) = events([call], 1)
    count = max(1, min(20, int(20 / max(first, 1e-3))))
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    for _ in range(count):
        call()
    end.record()
    torch.cuda.synchronize()
    return begin.elapsed_time(end) / count / 1e3
