"""When slimming is due, and how many slots a row holds: pure arithmetic, for caches and for predictions."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import NamedTuple


class Held(NamedTuple):
    """The state of a row after a text."""

    slots: int
    evictions: int  # slimmings that dropped slots


@dataclass(frozen=True)
class Schedule:
    """Slimming to `window` slots after each chunk of a prompt, and after every `interval`-th decode step.

    The clock counts forwards: a prompt is forward 0, in however many chunks, and decode steps count from 1.
    """

    window: int
    interval: int
    chunk: int | None = None  # prompt tokens between slimmings; None = all
    # Windows of their own, and how many heads have each; `window` is the mean. A row then holds the mean of its heads.
    heads: tuple[tuple[int, int], ...] = ()

    @property
    def smallest(self) -> int:
        """The window of the head that is the first to drop slots."""
        return min((window for window, _ in self.heads), default=self.window)

    def is_due(self, clock: int) -> bool:
        """Whether slimming follows forward number `clock`, if that is a decode step."""
        return clock % self.interval == 0

    def last_due(self, clock):
        """The last forward, up to number `clock`, that was followed by slimming; for an int or an array."""
        return clock // self.interval * self.interval

    def steps_to_due(self, clock: int) -> int:
        """How many decode steps, starting with number `clock`, it takes to include the next slimming."""
        return -clock % self.interval + 1

    def columns_at_once(self, prompt: int) -> int:
        """How many tokens of a prompt are computed at once."""
        return prompt if self.chunk is None else min(prompt, self.chunk)

    def evicts(self, prompt: int, steps: int) -> bool:
        """Whether a row has lost slots after a prompt and `steps` decode steps."""
        return prompt + self.last_due(steps) > self.smallest

    def evicts_in_prefill(self, prompt: int) -> bool:
        """Whether slots are dropped before the last chunk of a prompt, which therefore does not see them."""
        return self.chunk is not None and (prompt - 1) // self.chunk * self.chunk > self.smallest

    def held_after(self, prompt: int, steps: int) -> Held:
        """The state of a row after a prompt and `steps` decode steps."""
        if self.heads:
            held = {window: self._alone(window).held_after(prompt, steps) for window, _ in self.heads}
            slots = self._mean({window: of.slots for window, of in held.items()})
            return Held(round(slots), held[self.smallest].evictions)
        slots = evictions = 0
        for new, due in self._forwards(prompt, steps):
            slots += new
            if due:
                evictions += slots > self.window
                slots = min(slots, self.window)
        return Held(slots, evictions)

    def slots_read(self, prompt: int, steps: int) -> float:
        """Slots that a decode step attends to, including its own, averaged over `steps` steps after a prompt."""
        if self.heads:
            return self._mean({window: self._alone(window).slots_read(prompt, steps) for window, _ in self.heads})
        start = min(prompt, self.window)
        # steps up to the first slimming that leaves a full window
        growing = min(steps, -(-(self.window - start) // self.interval) * self.interval)
        cycles, rest = divmod(steps - growing, self.interval)
        total = sum_of_growing(start, growing) + cycles * sum_of_growing(self.window, self.interval)
        return (total + sum_of_growing(self.window, rest)) / steps

    def _alone(self, window: int) -> Schedule:
        return replace(self, window=window, heads=())

    def _mean(self, of_window: dict[int, float]) -> float:
        """The mean over all heads of what the heads of each window have."""
        return sum(count * of_window[window] for window, count in self.heads) / sum(count for _, count in self.heads)

    def _forwards(self, prompt: int, steps: int) -> Iterator[tuple[int, bool]]:
        """New tokens of each chunk and step, and whether slimming follows."""
        chunk = self.columns_at_once(prompt)
        for begin in range(0, prompt, chunk):
            yield min(chunk, prompt - begin), True
        for step in range(1, steps + 1):
            yield 1, self.is_due(step)


def sum_of_growing(start: int, steps: int) -> int:
    """Total slots read by `steps` decode steps if nothing is dropped; the first step reads start + 1."""
    return steps * start + steps * (steps + 1) // 2
