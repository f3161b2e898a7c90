"""What a person sees of a run: a live bar on a terminal, plain lines anywhere else."""

from __future__ import annotations

import time
from collections.abc import Mapping
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn


class Reporter:
    """Shows steps, images a second, time left and the key figures; silent on all but the main process.

    ``unit`` is what a step is called. ``total_steps`` or ``total_seconds`` bounds the run; with both,
    whichever comes first ends it.
    """

    def __init__(
        self,
        title: str,
        *,
        total_steps: int | None,
        total_seconds: float | None,
        main: bool = True,
        unit: str = "step",
        console: Console | None = None,
    ) -> None:
        self._title = title
        self._total_steps = total_steps
        self._total_seconds = total_seconds
        self._main = main
        self._unit = unit
        self._console = console or Console(stderr=True)
        self._bar: Progress | None = None
        self._task: TaskID | None = None
        self._rate = _Rate()
        self._images_rate = _Rate()
        self._values: Mapping[str, float] = {}

    def __enter__(self) -> Reporter:
        if self._main and self._console.is_terminal:
            self._bar = Progress(
                TextColumn("[bold]{task.description}"),
                BarColumn(bar_width=24),
                TextColumn("{task.fields[text]}"),
                console=self._console,
            )
            self._task = self._bar.add_task(self._title, total=1.0, text="starting")
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None

    def say(self, message: str) -> None:
        """One line above the bar, or a plain line."""
        if self._main:
            self._console.print(f"{self._title}: {message}", markup=False, highlight=False, soft_wrap=True)

    def step(self, step: float, seconds: float, images: float) -> None:
        """Note a finished step, or part of one: ``seconds`` of training and ``images`` seen since the run's
        beginning."""
        self._rate.note(step, seconds)
        self._images_rate.note(images, seconds)
        if self._bar is not None and self._task is not None:
            self._bar.update(
                self._task, completed=self.progress(step, seconds), text=self._line(step, seconds)
            )

    def figures(self, step: float, seconds: float, values: Mapping[str, float]) -> None:
        """Show the figures of a logging interval: in the bar's line, and as a plain line off a terminal."""
        self._values = values
        line = self._line(step, seconds)
        if self._bar is not None and self._task is not None:
            self._bar.update(self._task, text=line)
        else:
            self.say(line)

    def progress(self, step: float, seconds: float) -> float:
        """Share of the run that is over, in [0, 1]."""
        shares = [0.0]
        if self._total_steps is not None:
            shares.append(step / max(self._total_steps, 1))
        if self._total_seconds is not None:
            shares.append(seconds / max(self._total_seconds, 1e-9))
        return min(max(shares), 1.0)

    @property
    def images_per_second(self) -> float:
        return self._images_rate.per_second

    def _line(self, step: float, seconds: float) -> str:
        total = f"/{self._total_steps}" if self._total_steps is not None else ""
        parts = [f"{self._unit} {int(step)}{total}", f"{self.images_per_second:.1f} images/s"]
        left = self._seconds_left(step, seconds)
        if left is not None:
            parts.append(f"{_duration(left)} left")
        parts += [f"{name} {value:.4g}" for name, value in self._values.items()]
        return "  ".join(parts)

    def _seconds_left(self, step: float, seconds: float) -> float | None:
        left = []
        if self._total_steps is not None and self._rate.per_second > 0:
            left.append((self._total_steps - step) / self._rate.per_second)
        if self._total_seconds is not None:
            left.append(self._total_seconds - seconds)
        return max(min(left), 0.0) if left else None


class _Rate:
    """A count's growth per second over about the last twenty seconds."""

    def __init__(self) -> None:
        self._points: list[tuple[float, float]] = []

    def note(self, count: float, seconds: float) -> None:
        self._points.append((seconds, count))
        while len(self._points) > 2 and self._points[1][0] < seconds - 20:
            self._points.pop(0)

    @property
    def per_second(self) -> float:
        if len(self._points) < 2:
            return 0.0
        (begin, first), (end, last) = self._points[0], self._points[-1]
        return (last - first) / max(end - begin, 1e-9)


def _duration(seconds: float) -> str:
    whole = int(seconds)
    if whole >= 3600:
        return f"{whole // 3600}h{whole % 3600 // 60:02d}m"
    return f"{whole // 60}m{whole % 60:02d}s"


class Stopwatch:
    """Seconds of training, counted on from what earlier parts of a resumed run took."""

    def __init__(self, earlier: float = 0.0) -> None:
        self._earlier = earlier
        self._start = time.monotonic()

    @property
    def seconds(self) -> float:
        return self._earlier + time.monotonic() - self._start
