"""utils/schedule.py against a plain loop over forwards."""

import itertools

import numpy as np
import pytest

from h2optimizer.utils.schedule import Schedule

SCHEDULES = [Schedule(*of) for of in itertools.product((2, 5, 8), (1, 3, 4), (None, 1, 3, 40))]


def forwards(schedule, prompt, steps):
    """(slots attended to, whether the forward was slimmed, whether that dropped slots) of each chunk and step."""
    slots, chunk = 0, schedule.chunk or prompt
    new = [min(chunk, prompt - begin) for begin in range(0, prompt, chunk)]
    for i, n in enumerate(new + [1] * steps):
        slots += n
        due = i < len(new) or (i - len(new) + 1) % schedule.interval == 0
        dropped = due and slots > schedule.window
        yield slots, due, dropped
        slots = schedule.window if dropped else slots


@pytest.mark.parametrize("schedule", SCHEDULES, ids=str)
def test_a_schedule_is_a_plain_loop(schedule):
    """Slimming a step early or late, a window that is never full, or a chunk that is not counted."""
    for prompt, steps in itertools.product((1, 3, 7, 8, 9, 20), range(1, 14)):
        table = list(forwards(schedule, prompt, steps))
        held = schedule.held_after(prompt, steps)
        slots, due, dropped = table[-1]
        assert held == (schedule.window if dropped else slots, sum(dropped for *_, dropped in table))
        assert schedule.evicts(prompt, steps) == (held.evictions > 0)
        chunks = len(table) - steps
        assert schedule.evicts_in_prefill(prompt) == any(dropped for *_, dropped in table[: chunks - 1])
        assert schedule.slots_read(prompt, steps) == sum(slots for slots, *_ in table[chunks:]) / steps
        assert schedule.is_due(steps) == due
        last = max([0, *(step for step in range(1, steps + 1) if table[chunks + step - 1][1])])
        assert schedule.last_due(steps) == schedule.last_due(np.array([steps]))[0] == last
        ahead = schedule.steps_to_due(steps)
        assert [schedule.is_due(step) for step in range(steps, steps + ahead)] == [False] * (ahead - 1) + [True]


@pytest.mark.parametrize("chunk", [None, 3])
def test_heads_of_their_own_windows_are_a_mean(chunk):
    """A head counted once where several have its window, or evictions that are not those of the shortest."""
    alone = {window: Schedule(window, 3, chunk) for window in (2, 5, 9)}
    together = Schedule(5, 3, chunk, ((2, 4), (5, 1), (9, 3)))
    for prompt, steps in itertools.product((1, 4, 8, 20), range(1, 9)):
        held = {window: schedule.held_after(prompt, steps) for window, schedule in alone.items()}
        mean = (4 * held[2].slots + held[5].slots + 3 * held[9].slots) / 8
        assert together.held_after(prompt, steps) == (round(mean), held[2].evictions)
        read = {window: schedule.slots_read(prompt, steps) for window, schedule in alone.items()}
        assert together.slots_read(prompt, steps) == pytest.approx((4 * read[2] + read[5] + 3 * read[9]) / 8)
        assert together.evicts(prompt, steps) == alone[2].evicts(prompt, steps)
        assert together.evicts_in_prefill(prompt) == alone[2].evicts_in_prefill(prompt)
