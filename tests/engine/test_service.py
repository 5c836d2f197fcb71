"""A service: many clients, one thread that drives the engine, and nobody disturbs anybody."""

import asyncio
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from gate import Gate
from waiting import HANG_S, wait_until

import hotloop.engine.service
from hotloop import LLM, SamplingParams
from hotloop.engine.core import Admit, Done, StepResult
from hotloop.engine.service import Service, Ticket
from hotloop.errors import (
    ContextLengthError,
    HotloopError,
    NumericsError,
    QueueFullError,
    RequestError,
    ServiceClosedError,
    SlowClientError,
)
from hotloop.types import Delta, Generation, Score

FREELY = SamplingParams(max_new_tokens=8, ignore_eos=True)
LONG = SamplingParams(max_new_tokens=250, ignore_eos=True)


@pytest.fixture(scope="module", autouse=True)
def alone(llm: LLM) -> list[tuple[int, ...]]:
    """The answers to [5, i]."""
    return [llm.generate([[5, i]], FREELY)[0].token_ids for i in range(20)]


@pytest.fixture
def service(llm: LLM) -> Iterator[Service]:
    with Service(llm) as service:
        yield service
    assert not any(thread.name == "hotloop-service" for thread in threading.enumerate())
    assert llm._scheduler.idle
    assert len(llm.generate([[5]], FREELY)[0].token_ids) == 8, "the engine can be used again"


def deltas(ticket: Ticket) -> list[Delta]:
    return [piece for piece in ticket if isinstance(piece, Delta)]


def ids_of(pieces: list[Delta]) -> tuple[int, ...]:
    return tuple(token for piece in pieces for token in piece.token_ids)


def generation(pieces: list[Delta]) -> Generation:
    *before, last = pieces
    assert all(piece.generation is None for piece in before)
    assert last.generation is not None
    return last.generation


def test_clients_of_several_threads_get_the_answers_of_each_alone(service, alone):
    with ThreadPoolExecutor(8) as pool:
        tickets = pool.map(lambda i: service.submit([5, i], FREELY), range(20))
        found = list(pool.map(deltas, tickets))
    for pieces, expected in zip(found, alone, strict=True):
        assert ids_of(pieces) == generation(pieces).token_ids == expected
        assert len(pieces) == 8, "each token is a piece"


def test_an_event_loop_is_woken_once_a_turn_for_all_its_clients(llm, alone, monkeypatch):
    async def client(service: Service, i: int) -> tuple[int, ...]:
        ticket, pieces = service.submit([5, i], FREELY), []
        assert ticket.prompt_tokens == 2
        while not ticket.done:
            await ticket.arrived()
            pieces += ticket.take()
        return ids_of(pieces)

    async def serve() -> None:
        loop = asyncio.get_running_loop()
        calls, call = [], loop.call_soon_threadsafe
        monkeypatch.setattr(loop, "call_soon_threadsafe", lambda *a: calls.append(a) or call(*a))
        iterations, iterate = [], llm._scheduler.iterate
        monkeypatch.setattr(llm._scheduler, "iterate", lambda: iterations.append(1) or iterate())
        with Service(llm, loop=loop) as service:
            found = await asyncio.gather(*(client(service, i) for i in range(9)))
        assert found == alone[:9]
        assert 8 <= len(calls) <= len(iterations)

    asyncio.run(serve())


@pytest.mark.parametrize("after", [0, 1, 5])
def test_a_cancelled_request_ends_at_once_and_the_others_do_not_notice(
    service, llm, alone, monkeypatch, after
):
    gate = Gate(llm, monkeypatch, n_free=10)
    cancelled, other = service.submit([9], LONG), service.submit([5, 3], FREELY)
    taken = []
    while len(taken) < after:
        cancelled.wait()
        taken += cancelled.take()
    service.cancel(cancelled)
    gate.open.set()
    taken += deltas(cancelled)
    assert generation(taken).finish_reason == "cancelled"
    assert len(generation(taken).token_ids) < 20
    assert ids_of(taken) == generation(taken).token_ids
    assert ids_of(deltas(other)) == alone[3]
    service.cancel(cancelled)  # again does no harm


def test_who_waits_is_cancelled_too(service, llm, monkeypatch):
    gate = Gate(llm, monkeypatch)
    tickets = [service.submit([9], LONG) for _ in range(6)]
    service.cancel(tickets[5])
    gate.open.set()
    assert generation(deltas(tickets[5])).token_ids == ()
    for ticket in tickets[:5]:
        service.cancel(ticket)


def test_the_queue_has_a_limit_and_what_is_refused_takes_no_room(llm, alone, monkeypatch):
    gate = Gate(llm, monkeypatch)
    with Service(llm, max_queued=2) as service:
        tickets = [service.submit([5, i], FREELY) for i in range(5)]  # 3 seats, 2 wait
        for _ in range(3):
            with pytest.raises(QueueFullError, match="2 requests are waiting"):
                service.submit([5, 5], FREELY)
        state = service.state()
        assert state.n_running + state.n_waiting == 5
        gate.open.set()
        assert [ids_of(deltas(ticket)) for ticket in tickets] == alone[:5]
        assert ids_of(deltas(service.submit([5, 5], FREELY))) == alone[5]


def test_what_cannot_be_served_is_refused_by_the_call(service):
    with pytest.raises(ContextLengthError, match="400 tokens") as caught:
        service.submit([7] * 400, FREELY)
    assert caught.value.context == 320
    with pytest.raises(ContextLengthError):
        service.submit([7] * 100, SamplingParams(max_new_tokens=300))
    with pytest.raises(ContextLengthError):
        service.score([7] * 400)
    with pytest.raises(RequestError, match="there is no prompt"):
        service.submit_all([])
    with pytest.raises(RequestError, match="empty"):
        service.submit([], FREELY)
    many = SamplingParams(max_new_tokens=300, ignore_eos=True)
    clamped = generation(deltas(service.submit([7] * 310, many, clamp=True)))
    assert (len(clamped.token_ids), clamped.finish_reason) == (10, "length")


def test_a_slow_client_is_cancelled_and_the_others_are_not(llm, alone):
    with Service(llm, max_unread_bytes=200) as service:
        slow = service.submit([9], LONG)
        others = [service.submit([5, i], FREELY) for i in range(3)]
        assert [ids_of(deltas(ticket)) for ticket in others] == alone[:3]
        wait_until(lambda: service.state().n_running == 0, "all requests end")
        pieces = slow.take()
        taken = [len(piece.text.encode()) + 8 * len(piece.token_ids) for piece in pieces]
        assert sum(taken[:-1]) <= 200 < sum(taken)
        with pytest.raises(SlowClientError, match="200 bytes of its answer unread"):
            slow.take()
        assert slow.done


def test_a_prompt_is_launched_before_its_submission_to_an_idle_service_returns(
    service, llm, alone, monkeypatch
):
    monkeypatch.setattr(hotloop.engine.service, "SUBMIT_YIELD_S", HANG_S)
    launched, run = [], llm._runner.run
    monkeypatch.setattr(
        llm._runner, "run", lambda command: launched.append(command) or run(command)
    )
    wait_until(lambda: service.state().stalled_s == 0.0, "the engine is idle")
    ticket = service.submit([5, 1], FREELY)
    assert isinstance(launched[0], Admit)
    assert ids_of(deltas(ticket)) == alone[1]


def test_a_window_is_scored_between_the_steps_of_others(service, alone):
    ticket, window = service.submit([5, 2], FREELY), service.score([5, 6, 7, 8], n_top=4)
    assert ids_of(deltas(ticket)) == alone[2]
    (score,) = window
    assert isinstance(score, Score)
    assert score.token_logprobs.shape == (3,)
    assert (score.top1_logprobs >= score.token_logprobs).all()
    (whole,) = service.score([5, 6, 7, 8], full=True)
    assert isinstance(whole, Score)
    assert whole.log_probs is not None
    values, ids = whole.log_probs.topk(4)
    assert score.log_probs is whole.top is None
    assert score.top is not None
    assert torch.equal(score.top[0], ids)
    assert torch.equal(score.top[1], values)


class Panic(BaseException):
    """A panic of a library in Rust: no Exception."""


@pytest.mark.parametrize("kind", [RuntimeError, Panic])
def test_an_error_of_the_engine_reaches_every_client_and_ends_the_service(
    llm, alone, monkeypatch, kind
):
    with monkeypatch.context() as patch:
        gate = Gate(llm, patch)
        with Service(llm) as service:
            tickets = [service.submit([5, i], FREELY) for i in range(6)]

            def broken(_: object) -> None:
                raise kind("the device is gone")

            patch.setattr(llm._runner, "run", broken)
            gate.open.set()
            for ticket in tickets:
                with pytest.raises(HotloopError, match=f"{kind.__name__}: the device is gone"):
                    list(ticket)
            assert service.state().error is not None
            with pytest.raises(HotloopError, match="the device is gone"):
                service.submit([5], FREELY)
            assert service.drain(HANG_S)
    assert llm.generate([[5, 1]], FREELY)[0].token_ids == alone[1]


def test_logits_that_are_not_finite_end_their_own_request(service, llm, alone, monkeypatch):
    run = llm._runner.run

    def damaged(command: Any) -> Any:
        pending = run(command)
        if not isinstance(command, Admit):
            return pending
        rows = list(pending.wait().rows)
        for row, prompt in enumerate(command.prompts):
            if list(prompt.prompt_ids) == [9, 9]:
                rows[row] = [(-1, None)]
        return Done(StepResult(rows=rows, n_drafts=[0] * len(rows)))

    monkeypatch.setattr(llm._runner, "run", damaged)
    bad, good = service.submit([9, 9], FREELY), service.submit([5, 1], FREELY)
    with pytest.raises(NumericsError, match="logits are not finite"):
        list(bad)
    assert ids_of(deltas(good)) == alone[1]


def test_draining_ends_what_was_begun_and_refuses_what_comes(llm, alone):
    with Service(llm) as service:
        tickets = [service.submit([5, i], FREELY) for i in range(6)]
        assert service.drain(HANG_S)
        with pytest.raises(ServiceClosedError):
            service.submit([5], FREELY)
        assert [ids_of(deltas(ticket)) for ticket in tickets] == alone[:6]


def test_closing_cancels_what_runs(llm):
    with Service(llm) as service:
        tickets = [service.submit([9], LONG) for _ in range(5)]
        tickets[0].wait()
        assert not service.drain(0.0)
    for ticket in tickets:
        assert generation(deltas(ticket)).finish_reason == "cancelled"
    service.close()  # again does no harm


def test_the_heartbeat_tells_a_stalled_engine_from_an_idle_one(service, llm, monkeypatch):
    assert service.state().stalled_s == 0.0
    gate = Gate(llm, monkeypatch)
    ticket = service.submit([5], FREELY)
    wait_until(lambda: service.state().stalled_s > 0.05, "the engine stalls")
    gate.open.set()
    list(ticket)
    wait_until(lambda: service.state().stalled_s == 0.0, "the engine is idle")


@pytest.mark.usefixtures("service")
def test_a_served_engine_has_no_other_user(llm):
    for call in (
        lambda: llm.generate([[5]], FREELY),
        lambda: next(llm.stream([[5]], FREELY)),
        lambda: list(llm.score([[5, 6]])),
        lambda: llm.meter().__enter__(),
        lambda: Service(llm),
        llm.close,
    ):
        with pytest.raises(RequestError, match="has a service"):
            call()
    assert llm.describe().max_seq_len == 320


def test_an_engine_in_the_middle_of_a_stream_is_not_served(llm, alone):
    stream = llm.stream([[5, 4]], FREELY)
    first = next(stream).token_ids
    with pytest.raises(RequestError, match="in the middle of a stream"):
        Service(llm)
    assert first + tuple(i for delta in stream for i in delta.token_ids) == alone[4]


def test_threads_take_turns_within_less_than_a_step_while_it_runs(llm):
    before = sys.getswitchinterval()
    with Service(llm):
        assert sys.getswitchinterval() <= 1e-4
    assert sys.getswitchinterval() == before


def test_random_clients_come_and_go_and_every_answer_is_whole(llm, alone):
    with Service(llm) as service, ThreadPoolExecutor(6) as pool:

        def client(i: int) -> tuple[int, ...]:
            time.sleep(i % 5 * 1e-3)
            if i % 3 == 2:
                ticket = service.submit([9, i], LONG)
                ticket.wait(i % 7 * 1e-3)
                service.cancel(ticket)
                assert generation(deltas(ticket)).finish_reason == "cancelled"
            return ids_of(deltas(service.submit([5, i % 20], FREELY)))

        assert list(pool.map(client, range(40))) == (alone * 2)
        assert service.state().n_running == service.state().n_waiting == 0
