"""The scheduler against a core without a device: who is in a step, and who gets its tokens."""

import dataclasses
import subprocess
import sys
from collections.abc import Sequence
from typing import Any

import pytest

from hotloop.engine.core import (
    Admit,
    Command,
    Done,
    MoveRow,
    Pending,
    Step,
    StepResult,
    StepTimes,
)
from hotloop.engine.draft_control import DraftController
from hotloop.engine.request import Request
from hotloop.engine.scheduler import Scheduler
from hotloop.types import SamplingParams

N_POSITIONS = 64
END = 7
"""Ends an answer whose request does not ignore it."""


@dataclasses.dataclass
class Row:
    """A sequence on the fake device: its seat, its prompt's first token, and how far it is."""

    seat: int
    name: int
    n: int = 0


class FakeCore:
    """Counts: the i-th token of the answer to prompt [p] is 100 p + i, unless it is to be ``END``.

    It checks what no core may be asked for: two requests in one seat, rows that are not dense.
    Steps are counted when they are launched, as on a stream; their tokens wait to be asked for.
    """

    captures = False

    def __init__(
        self, n_rows: int, *, asynchronous: bool = False, ends: dict[int, int] | None = None
    ) -> None:
        self.asynchronous, self.n_rows = asynchronous, n_rows
        self.ends = ends or {}  # by prompt, how many tokens before the end
        self.rows: dict[int, Row] = {}
        self.commands: list[Command[Any]] = []
        self.right = 0  # drafts that are right in a step that has any

    def run(self, command: Command[Any]) -> Pending[Any]:
        self.commands.append(command)
        match command:
            case Admit():
                name, *_ = command.prompt_ids
                self.rows[command.row] = Row(command.seat, name)
                return Done(StepResult(rows=[self._tokens(command.row, 1)], n_drafts=[0]))
            case MoveRow():
                assert command.target < command.source
                self.rows[command.target] = self.rows.pop(command.source)
                return Done(None)
            case Step():
                return Done(self._step(command))
        raise AssertionError(command)

    def _step(self, step: Step) -> StepResult:
        assert sorted(step.seats) == list(range(self.n_rows)), "no two rows share a seat"
        for row in range(step.n):
            assert step.seats[row] == self.rows[row].seat, "a request stays in its seat"
        for row, position in step.known_positions.items():
            assert position <= self.rows[row].n <= position + step.slack
            assert self.rows[row].n + step.k + step.n_steps <= step.longest
        n_new = step.n_steps if step.k == 0 else 1 + min(self.right, step.k)
        return StepResult(
            rows=[self._tokens(row, n_new) for row in range(step.n)],
            n_drafts=[step.k] * step.n,
            k=step.k,
            times=StepTimes(model_s=1.0),
        )

    def _tokens(self, row: int, n: int) -> list[tuple[int, None]]:
        state, tokens = self.rows[row], []
        for _ in range(n):
            ended = state.n == self.ends.get(state.name, -1)
            tokens.append((END if ended else 100 * state.name + state.n, None))
            state.n += 1
        return tokens

    def close(self) -> None:
        pass

    @property
    def steps(self) -> list[Step]:
        return [command for command in self.commands if isinstance(command, Step)]


def request(name: int, n: int, *, ignore_eos: bool = True, speculates: bool = False) -> Request:
    return Request(
        name,
        [name],
        SamplingParams(ignore_eos=ignore_eos),
        seed=0,
        max_new_tokens=n,
        eos_ids={END},
        tokenizer=None,
        submitted_s=0.0,
        speculates=speculates,
    )


def scheduler(core: FakeCore, **options: Any) -> Scheduler:
    return Scheduler(core, n_rows=core.n_rows, n_positions=N_POSITIONS, **options)


def finish(scheduler: Scheduler) -> list[tuple[int, int]]:
    """Iterates until the scheduler is idle: (request, token), in the order of delivery."""
    found = []
    while not scheduler.idle:
        found += [(r.index, token) for r, delta in scheduler.iterate() for token in delta.token_ids]
    return found


def expected(name: int, n: int) -> list[int]:
    return [100 * name + i for i in range(n)]


both = pytest.mark.parametrize("asynchronous", [False, True], ids=["sync", "async"])


@both
def test_every_request_gets_its_own_tokens_and_they_are_admitted_as_they_came(asynchronous):
    core = FakeCore(3, asynchronous=asynchronous, ends={2: 4, 5: 0, 6: 3})
    driven = scheduler(core)
    requests = [request(name, 3 + name, ignore_eos=name % 2 == 1) for name in range(1, 9)]
    for each in requests:
        driven.submit(each)
    delivered = finish(driven)
    for each in requests:
        n = each.max_new_tokens
        if each.index in (2, 6):
            assert each.token_ids == [*expected(each.index, core.ends[each.index]), END]
            assert each.finish_reason == "eos"
        elif each.index == 5:
            assert each.token_ids == [END, *expected(5, n)[1:]], "it ignores the end"
        else:
            assert each.token_ids == expected(each.index, n)
            assert each.finish_reason == "length"
        assert [token for index, token in delivered if index == each.index] == each.token_ids
    admitted = [c.prompt_ids[0] for c in core.commands if isinstance(c, Admit)]
    assert admitted == list(range(1, 9))


@both
def test_a_request_can_be_submitted_between_iterations_while_others_run(asynchronous):
    core = FakeCore(2, asynchronous=asynchronous)
    driven, first, second = scheduler(core), request(1, 9), request(2, 4)
    driven.submit(first)
    for _ in range(3):
        list(driven.iterate())
    driven.submit(second)
    finish(driven)
    assert (first.token_ids, second.token_ids) == (expected(1, 9), expected(2, 4))


@both
def test_what_is_left_moves_to_the_first_rows_and_stays_in_its_seats(asynchronous):
    core = FakeCore(4, asynchronous=asynchronous)
    driven = scheduler(core)
    for name, n in ((1, 3), (2, 20), (3, 5), (4, 12)):
        driven.submit(request(name, n))
    finish(driven)
    sizes = [step.n for step in core.steps]
    assert sizes == sorted(sizes, reverse=True)
    assert (sizes[0], sizes[-1]) == (4, 1)
    assert core.steps[-1].seats[0] == 1, "where its prompt was put"
    moves = [(c.source, c.target) for c in core.commands if isinstance(c, MoveRow)]
    assert moves == [(3, 0), (1, 0)]


@both
def test_who_waits_takes_the_place_of_who_ends_and_nobody_moves(asynchronous):
    core = FakeCore(2, asynchronous=asynchronous)
    driven = scheduler(core)
    for name in range(1, 7):
        driven.submit(request(name, 4 + name % 2 * 3))
    finish(driven)
    (*_, last) = (i for i, command in enumerate(core.commands) if isinstance(command, Admit))
    before = core.commands[:last]
    assert not any(isinstance(command, MoveRow) for command in before)
    assert {command.seats for command in before if isinstance(command, Step)} == {(0, 1)}


def test_seats_are_in_order_again_once_nothing_runs():
    core = FakeCore(3)
    driven = scheduler(core)
    for round_ in range(3):
        for name, n in ((1, 3), (2, 9), (3, 6)):
            driven.submit(request(name, n))
        before = len(core.steps)
        finish(driven)
        assert core.steps[before].seats == (0, 1, 2), round_


@both
@pytest.mark.parametrize("after", [0, 1, 2, 5])
@pytest.mark.parametrize("who", [1, 2, 3, 4])
def test_a_cancelled_request_gets_no_more_tokens_and_its_place_goes_to_another(
    asynchronous, after, who
):
    core = FakeCore(2, asynchronous=asynchronous)
    driven, requests = scheduler(core), [request(name, 8) for name in (1, 2, 3, 4)]
    for each in requests:
        driven.submit(each)
    for _ in range(after):
        list(driven.iterate())
    cancelled = requests[who - 1]
    had = list(cancelled.token_ids)
    driven.cancel(cancelled)
    driven.cancel(cancelled)  # again does no harm
    for _ in range(2):
        list(driven.iterate())
    waiting = [r for r in requests if not r.ended and not r.token_ids]
    assert len(waiting) < 2 or who > 2, "within two iterations its row is another's"
    finish(driven)
    assert cancelled.finish_reason == "cancelled"
    assert cancelled.token_ids == had
    assert cancelled.generation().finish_reason == "cancelled"
    for other in requests:
        if other is not cancelled:
            assert other.token_ids == expected(other.index, 8)


@both
def test_with_all_its_requests_cancelled_it_is_idle_at_once(asynchronous):
    core = FakeCore(2, asynchronous=asynchronous)
    driven, requests = scheduler(core), [request(name, 8) for name in (1, 2, 3)]
    for each in requests:
        driven.submit(each)
    list(driven.iterate())
    for each in requests:
        driven.cancel(each)
    assert driven.idle
    again = request(4, 5)
    driven.submit(again)
    finish(driven)
    assert again.token_ids == expected(4, 5)


def test_a_cancelled_request_that_has_ended_stays_as_it_is():
    driven, ended = scheduler(FakeCore(1)), request(1, 2)
    driven.submit(ended)
    finish(driven)
    driven.cancel(ended)
    assert ended.finish_reason == "length"


@both
def test_several_steps_are_taken_at_once_only_while_nothing_waits(asynchronous):
    core = FakeCore(1, asynchronous=asynchronous)
    driven, requests = scheduler(core, n_steps=4), [request(1, 14), request(2, 14)]
    for each in requests:
        driven.submit(each)
    finish(driven)
    assert [r.token_ids for r in requests] == [expected(1, 14), expected(2, 14)]
    numbers: Sequence[int] = [step.n_steps for step in core.steps]
    assert set(numbers[:13]) == {1}
    assert 4 in numbers[13:]
    assert all(n in (1, 4) for n in numbers)


@both
@pytest.mark.parametrize("right", [0, 2, 4])
def test_drafts_that_are_right_bring_several_tokens_and_none_beyond_the_end(asynchronous, right):
    core = FakeCore(2, asynchronous=asynchronous)
    core.right = right
    controller = DraftController((0, 2, 4), always=True)
    driven = scheduler(core, controller=controller)
    requests = [request(1, 17, speculates=True), request(2, 6, speculates=True)]
    for each in requests:
        driven.submit(each)
    finish(driven)
    assert [r.token_ids for r in requests] == [expected(1, 17), expected(2, 6)]
    assert {step.k for step in core.steps} <= {0, 2, 4}
    assert max(step.k for step in core.steps) == 4
    for each in requests:
        speculation = each.generation().speculation
        assert speculation is not None
        assert speculation.n_tokens == len(each.token_ids) - 1


def test_the_next_step_is_launched_before_the_last_ones_tokens_are_looked_at():
    order: list[str] = []

    class Watched(FakeCore):
        def run(self, command: Command[Any]) -> Pending[Any]:
            pending, name = super().run(command), type(command).__name__
            order.append(f"run {name}")

            class Later:
                def wait(self) -> Any:
                    order.append(f"wait {name}")
                    return pending.wait()

            return Later()

    driven = scheduler(Watched(1, asynchronous=True))
    driven.submit(request(1, 4))
    finish(driven)
    assert order == [
        *("run Admit", "wait Admit"),
        *("run Step", "run Step", "wait Step"),
        *("run Step", "wait Step", "wait Step"),
    ]


def test_it_needs_no_torch():
    code = "import sys, hotloop.engine.scheduler; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
