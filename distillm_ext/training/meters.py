"""What a training run reports, gathered without asking the accelerator for a value before it is logged.

Logged with every loss:

* `loss`, `loss_divergence`, `loss_ce`, `loss_lm`, `loss_router`: means per optimizer step; the last is the balance of
  the student's experts, without its coefficient. `teacher_entropy`, `student_entropy`, `top1_agreement`: means over
  tokens, where the teacher's logits are not compressed.
* `nan_steps`: optimizer steps left out so far (nan_policy "skip"). `phi`: of the policy "adaptive_off_policy".
* `batches_data`, `batches_fresh`, `batches_replay`: optimizer steps by source since the last log. `batch_source`, in
  `state.log_history` alone: the source of the last step. `replay_size`: sequences, all processes.
* `tokens_per_second`: all processes. `time_generation`, `time_teacher`, `time_student`, `time_loss`, `time_other`:
  shares of the time, evaluation and checkpoints left out; where the loss is fused with the heads, their products count
  as loss.
* With compressed teacher logits `teacher_rows` and `reused_rows`: rows whose teacher output was computed, and taken
  from store or cache, since the last log; `reuse_disk_mib`: MiB of kept teacher logits, all processes.
"""

from __future__ import annotations

import contextlib
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

# The sources every report counts, so that a plot has no gaps.
SOURCES = ("data", "fresh", "replay")
# Means over tokens that are no part of the loss, logged under their own names.
METRICS = ("teacher_entropy", "student_entropy", "top1_agreement")
SHARES = ("generation", "teacher", "student", "loss")


class StepClock:
    """Time by section since the last report.

    On CUDA a section is two events on the stream, read when a report is made: no section waits for the device.
    Sections may nest; the inner one's time is taken off the outer one. Time spent in "excluded" (evaluation,
    checkpoints) counts for nothing.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._events: list[tuple[str, torch.cuda.Event, torch.cuda.Event, int]] = []
        self._seconds: defaultdict[str, float] = defaultdict(float)
        self._open: list[str] = []
        self._started = time.perf_counter()

    @contextlib.contextmanager
    def section(self, name: str) -> Iterator[None]:
        """Times the body under `name`."""
        parent = self._open[-1] if self._open else None
        self._open.append(name)
        start = self._stamp()
        try:
            yield
        finally:
            end = self._stamp()
            self._open.pop()
            self._add(name, start, end, 1)
            if parent is not None:
                self._add(parent, start, end, -1)

    def report(self) -> tuple[dict[str, float], float]:
        """→ (seconds by section, wall-clock seconds without "excluded") since the last report, and starts anew."""
        if self._events:
            torch.cuda.synchronize(self.device)
        for name, start, end, sign in self._events:
            self._seconds[name] += sign * start.elapsed_time(end) / 1e3
        seconds, now = dict(self._seconds), time.perf_counter()
        wall = max(now - self._started - seconds.pop("excluded", 0.0), 1e-9)
        self.restart()
        return seconds, wall

    def restart(self) -> None:
        """Forgets everything timed so far."""
        self._events, self._seconds, self._started = [], defaultdict(float), time.perf_counter()

    def _stamp(self) -> float | torch.cuda.Event:
        if self.device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self.device))
        return event

    def _add(self, name: str, start: float | torch.cuda.Event, end: float | torch.cuda.Event, sign: int) -> None:
        if isinstance(start, float) and isinstance(end, float):
            self._seconds[name] += sign * (end - start)
        elif isinstance(start, torch.cuda.Event) and isinstance(end, torch.cuda.Event):
            self._events.append((name, start, end, sign))


class Meters:
    """Sums since the last report.

    Loss parts stay on the device as running sums. Counts are Python ints, known on the host.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.clock = StepClock(device)
        self.last_source: str | None = None
        self._running = False
        self._sums: dict[str, Tensor] = {}
        self._steps: dict[str, Tensor] = {}
        self._step: dict[str, Tensor] = {}
        self._step_number: int | None = None
        self._sources: Counter[str] = Counter()
        self._tokens = 0

    def begin(self) -> None:
        """Starts the clock at the first step: setting up the run is no part of it."""
        if not self._running:
            self._running = True
            self.clock.restart()

    def start_step(self, source: str, tokens: int) -> None:
        """Counts an optimizer step and the tokens this process trains on in it."""
        self.last_source = source
        self._sources[source] += 1
        self._tokens += tokens

    def add_losses(self, step: int, parts: dict[str, Tensor]) -> None:
        """Adds the loss parts of one micro-batch of optimizer step `step`."""
        if step != self._step_number:
            self.end_step()
            self._step_number = step
        for name, value in parts.items():
            if name not in self._step:
                self._step[name] = torch.zeros((), dtype=torch.float32, device=self.device)
            self._step[name] += value.detach().to(self._step[name])

    def end_step(self, dropped: Tensor | None = None) -> None:
        """Adds the loss parts of the optimizer step under way to the sums.

        Args:
            dropped: scalar on the device, > 0 where the step was not taken: it then counts for nothing.
        """
        for name, value in self._step.items():
            if name not in self._sums:
                self._sums[name] = torch.zeros_like(value)
                self._steps[name] = torch.zeros_like(value)
            kept = torch.ones_like(value) if dropped is None else (dropped <= 0).to(value)
            self._sums[name] += torch.where(kept > 0, value, 0.0)
            self._steps[name] += kept
        self._step = {}

    def report(self, gather: Callable[[Tensor], Tensor], replay_size: int) -> dict[str, float]:
        """What to log, over all processes, and starts anew. The only place that waits for the device.

        Args:
            gather: [n] of this process → [processes, n].
            replay_size: sequences in this process's replay buffer.
        """
        self.end_step()
        # A part without a step that was taken is 0 / 0, and left out below.
        means = {name: total / self._steps[name] for name, total in sorted(self._sums.items())}
        counts = torch.tensor([float(self._tokens), float(replay_size)], device=self.device)
        gathered = gather(torch.cat([*(mean.reshape(1) for mean in means.values()), counts])).double()
        tokens, buffered = gathered[:, -2:].sum(dim=0).tolist()
        values = zip(means, gathered[:, :-2].mean(dim=0).tolist(), strict=True)
        losses = {name: value for name, value in values if float(self._steps[name]) > 0}
        seconds, wall = self.clock.report()
        shares = {f"time_{name}": max(seconds.get(name, 0.0), 0.0) / wall for name in SHARES}
        report = {name if name in METRICS else f"loss_{name}": value for name, value in losses.items()}
        if "total" in losses:
            report["loss"] = report.pop("loss_total")
        report |= {f"batches_{name}": self._sources[name] for name in sorted({*SOURCES, *self._sources})}
        report |= {"replay_size": int(buffered), "tokens_per_second": tokens / wall, **shares}
        report["time_other"] = max(1.0 - sum(shares.values()), 0.0)
        self._sums, self._steps, self._sources, self._tokens = {}, {}, Counter(), 0
        return report


def sum_over_processes(accelerator: Any, mine: Mapping[str, float]) -> dict[str, float]:
    """Numbers of this process, each summed over all; every process calls it, with the same names."""
    if not mine:
        return {}
    values = torch.tensor([list(mine.values())], dtype=torch.float64, device=accelerator.device)
    return dict(zip(mine, accelerator.gather(values).sum(dim=0).tolist(), strict=True))
