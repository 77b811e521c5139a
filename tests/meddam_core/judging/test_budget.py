"""The permit arithmetic, on a clock that the tests turn."""

from __future__ import annotations

import heapq
import random
from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from meddam_core.judging.budget import Limits, Permit, PermitBook, Spent, Wait


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def greedy(
    book: PermitBook, clock: Clock, until: float, rng: random.Random, sizes: Callable[[], int], travel_s: float = 0.4
) -> list[tuple[float, float]]:
    """Asks for as much as it can get; returns (arrival at the server, tokens used) of each call."""
    arrivals: list[tuple[float, float]] = []
    ends: list[tuple[float, int, Permit, float]] = []
    need = sizes()
    while clock.now < until:
        answer = book.ask(need)
        if isinstance(answer, Permit):
            used = need * rng.uniform(0.8, 1.0)
            arrivals.append((clock.now + rng.uniform(0, travel_s), used))
            heapq.heappush(ends, (clock.now + rng.uniform(0.3, 1.2), answer.id, answer, used))
            need = sizes()
            continue
        assert isinstance(answer, Wait)
        assert answer.seconds > 0
        after = clock.now + answer.seconds
        clock.now = min(after, ends[0][0]) if ends else after
        while ends and ends[0][0] <= clock.now:
            _, _, permit, used = heapq.heappop(ends)
            book.settle(permit, tokens=used)
    for _, _, permit, used in ends:
        book.settle(permit, tokens=used)
    return arrivals


def busiest(arrivals: list[tuple[float, float]], weigh: Callable[[float], float]) -> float:
    """The most that any sliding minute holds."""
    arrivals = sorted(arrivals)
    most = total = 0.0
    first = 0
    for at, tokens in arrivals:
        total += weigh(tokens)
        while arrivals[first][0] <= at - 60.0:
            total -= weigh(arrivals[first][1])
            first += 1
        most = max(most, total)
    return most


@pytest.mark.parametrize("rpm", [7, 60, 600])
@pytest.mark.parametrize("seed", [0, 1])
def test_requests_never_above_the_limit_and_97_percent_of_it(rpm: int, seed: int) -> None:
    clock, rng = Clock(), random.Random(seed)
    book = PermitBook(Limits(requests_per_min=rpm, max_concurrent=10**6), clock)
    arrivals = greedy(book, clock, 1000 + 400, rng, lambda: 1)
    assert busiest(arrivals, lambda t: 1) <= rpm
    assert len(arrivals) >= 0.97 * rpm * 400 / 60 - 1


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_tokens_never_above_the_limit_and_97_percent_of_it(seed: int) -> None:
    clock, rng = Clock(), random.Random(seed)
    book = PermitBook(Limits(tokens_per_min=200_000, max_concurrent=10**6), clock)
    arrivals = greedy(book, clock, 1000 + 300, rng, lambda: rng.randint(200, 1500))
    assert busiest(arrivals, lambda t: t) <= 200_000
    assert sum(t for _, t in arrivals) >= 0.97 * 200_000 * 300 / 60


def test_the_tighter_of_two_limits_rules() -> None:
    clock, rng = Clock(), random.Random(0)
    book = PermitBook(Limits(requests_per_min=1000, tokens_per_min=60_000, max_concurrent=10**6), clock)
    arrivals = greedy(book, clock, 1000 + 180, rng, lambda: 600)
    assert 270 <= len(arrivals) <= 400
    assert busiest(arrivals, lambda t: t) <= 60_000


@settings(max_examples=40, deadline=None)
@given(
    st.integers(1, 200),
    st.lists(st.tuples(st.floats(0, 90), st.integers(1, 400)), max_size=12),
    st.integers(0, 1000),
)
def test_no_pattern_of_demand_breaks_the_limit(rpm: int, bursts: list[tuple[float, int]], seed: int) -> None:
    clock, rng = Clock(), random.Random(seed)
    book = PermitBook(Limits(requests_per_min=rpm, tokens_per_min=rpm * 100, max_concurrent=10**6), clock)
    arrivals: list[tuple[float, float]] = []
    for pause, wanted in bursts:
        clock.now += pause
        for _ in range(wanted):
            answer = book.ask(rng.randint(1, 100))
            if isinstance(answer, Permit):
                arrivals.append((clock.now + rng.uniform(0, 0.5), answer.tokens))
                book.settle(answer)
            else:
                assert isinstance(answer, Wait)
    assert busiest(arrivals, lambda t: 1) <= rpm
    assert busiest(arrivals, lambda t: t) <= rpm * 100 + 1e-6


def test_a_wait_is_long_enough_and_not_longer() -> None:
    clock, rng = Clock(), random.Random(3)
    book = PermitBook(Limits(requests_per_min=50, max_concurrent=1000), clock)
    for _ in range(300):
        answer = book.ask(1)
        if isinstance(answer, Permit):
            book.settle(answer)
            clock.now += rng.choice([0, 0, 0, 0.2, 3])
            continue
        assert isinstance(answer, Wait)
        clock.now += answer.seconds * 0.98
        assert isinstance(book.ask(1), Wait)
        clock.now += answer.seconds * 0.02 + 1e-6
        granted = book.ask(1)
        assert isinstance(granted, Permit)
        book.settle(granted)


def test_it_starts_empty() -> None:
    clock = Clock()
    book = PermitBook(Limits(requests_per_min=60), clock)
    assert isinstance(book.ask(1), Wait)
    clock.now += 10.1
    granted = [book.ask(1) for _ in range(20)]
    assert sum(isinstance(a, Permit) for a in granted) == 10


def test_restarts_do_not_break_the_limit() -> None:
    """Killed without notice every 20 seconds, nothing saved: the jobs together stay within the minute's allowance."""
    clock, rng, arrivals = Clock(), random.Random(5), []
    for _ in range(12):
        book = PermitBook(Limits(requests_per_min=120, max_concurrent=10**6), clock)
        arrivals += greedy(book, clock, clock.now + 20, rng, lambda: 1)
    assert busiest(arrivals, lambda t: 1) <= 120


@pytest.mark.parametrize(("age_s", "known"), [(0.0, True), (2.0, True), (30.0, True), (300.0, True), (2.0, False)])
def test_a_restored_book_knows_its_bursts(age_s: float, known: bool) -> None:
    clock, rng = Clock(), random.Random(6)
    limits = Limits(requests_per_min=100, max_concurrent=10**6, max_usd=10)
    book = PermitBook(limits, clock)
    clock.now += 200
    arrivals = []
    for _ in range(100):
        permit = book.ask(1, usd=0.01)
        assert isinstance(permit, Permit)
        arrivals.append((clock.now, 1.0))
        book.settle(permit)
    state = book.state()
    assert state["spent_usd"] == pytest.approx(1.0)
    clock.now += age_s
    again = PermitBook(limits, clock)
    again.restore(state, age_s if known else None)
    assert again.spent_usd == pytest.approx(1.0)
    later = greedy(again, clock, clock.now + 120, rng, lambda: 1)
    assert busiest(arrivals + later, lambda t: 1) <= 100
    assert len(later) >= 60
    with pytest.raises(ValueError, match="cannot be restored"):
        again.restore(state, 0)


def test_dollars_are_reserved_and_never_exceeded() -> None:
    clock = Clock()
    book = PermitBook(Limits(max_usd=1.0, max_concurrent=100), clock)
    first = [book.ask(1, usd=0.3) for _ in range(4)]
    assert [type(a) for a in first] == [Permit, Permit, Permit, Spent]
    assert isinstance(first[0], Permit)
    book.settle(first[0], usd=0.1)
    assert isinstance(book.ask(1, usd=0.3), Permit)
    assert book.committed_usd == pytest.approx(1.0)
    assert book.state()["spent_usd"] == pytest.approx(1.0)


def test_concurrency_halves_once_a_burst_and_grows_back() -> None:
    clock = Clock()
    book = PermitBook(Limits(max_concurrent=16), clock)
    for _ in range(10):
        book.limited(retry_after_s=3)
    assert book.concurrency == 8
    assert book.ask(1) == Wait(3.0, "the server asked for a pause")
    clock.now += 3
    running = [book.ask(1) for _ in range(9)]
    assert sum(isinstance(a, Permit) for a in running) == 8
    for _ in range(8 + 9 + 10):
        book.succeeded()
    assert book.concurrency == 11


def test_a_reply_shows_when_a_call_had_arrived() -> None:
    """Fails if a call keeps its whole slack, which costs its share of every minute, or loses too much of it."""
    clock = Clock()
    book = PermitBook(Limits(requests_per_min=1, slack_s=1.5), clock)
    clock.now += 100
    permit = book.ask(1)
    assert isinstance(permit, Permit)
    clock.now += 0.3
    book.settle(permit, replied_ago_s=0.1)
    answer = book.ask(1)
    assert isinstance(answer, Wait)
    assert answer.seconds == pytest.approx(60.0 - 0.1)
    clock.now += answer.seconds + 1e-6
    late = book.ask(1)
    assert isinstance(late, Permit)
    clock.now += 40
    book.settle(late, replied_ago_s=0.0)
    answer = book.ask(1)
    assert isinstance(answer, Wait)
    assert answer.seconds == pytest.approx(60 + 1.5 - 40, abs=1e-3)


@pytest.mark.parametrize("slow_s", [0.0, 1.2])
def test_late_arrivals_never_break_the_limit_where_replies_show_them(slow_s: float) -> None:
    clock, rng = Clock(), random.Random(9)
    book = PermitBook(Limits(requests_per_min=120, max_concurrent=10**6), clock)
    arrivals: list[tuple[float, float]] = []
    ends: list[tuple[float, int, Permit, float]] = []
    while clock.now < 1300:
        answer = book.ask(1)
        if isinstance(answer, Permit):
            arrived = clock.now + rng.uniform(0, slow_s)
            arrivals.append((arrived, 1.0))
            heapq.heappush(ends, (arrived + rng.uniform(0.02, 0.3), answer.id, answer, 1.0))
            continue
        assert isinstance(answer, Wait)
        clock.now = min(clock.now + answer.seconds, ends[0][0]) if ends else clock.now + answer.seconds
        while ends and ends[0][0] <= clock.now:
            book.settle(heapq.heappop(ends)[2], replied_ago_s=0.0)
    assert busiest(arrivals, lambda t: 1) <= 120
    assert len(arrivals) >= 0.97 * 120 * 300 / 60


def test_a_hint_that_nothing_is_left_is_tried_by_one_call_and_three_lies_are_enough() -> None:
    clock = Clock()
    book = PermitBook(Limits(max_concurrent=10), clock)
    for lie in range(3):
        book.hinted(0, 30.0)
        clock.now += 1
        probe = book.ask(1)
        assert isinstance(probe, Permit)
        assert isinstance(book.ask(1), Wait), "one call at a time while it may be true"
        book.settle(probe)
        book.succeeded(probe.started)
        assert book.num_wrong_hints == lie + 1
        both = [book.ask(1), book.ask(1)]
        assert all(isinstance(p, Permit) for p in both)
        for p in both:
            assert isinstance(p, Permit)
            book.settle(p)
    book.hinted(0, 30.0)
    clock.now += 1
    assert [type(book.ask(1)) for _ in range(3)] == [Permit] * 3


def test_a_pause_of_a_day_is_tried_after_a_minute_and_an_outage_by_single_calls() -> None:
    clock = Clock()
    book = PermitBook(Limits(max_concurrent=10), clock)
    book.limited(retry_after_s=86_400)
    assert book.ask(1) == Wait(60.0, "the server asked for a pause")
    clock.now += 60
    probe = book.ask(1)
    assert isinstance(probe, Permit)
    assert isinstance(book.ask(1), Wait)
    book.settle(probe)
    book.succeeded(probe.started)
    assert isinstance(book.ask(1), Permit)
    assert book.num_wrong_hints == 0
    book = PermitBook(Limits(max_concurrent=10), clock)
    before = book.ask(1)
    assert isinstance(before, Permit)
    book.down(5.0)
    assert isinstance(book.ask(1), Wait)
    clock.now += 5
    assert isinstance(book.ask(1), Wait), "the call that runs is the probe"
    book.succeeded(before.started)
    book.settle(before)
    probe = book.ask(1)
    assert isinstance(probe, Permit)
    assert isinstance(book.ask(1), Wait), "a call from before the outage shows nothing"


def test_cancelled_calls_count_for_nothing() -> None:
    clock = Clock()
    book = PermitBook(Limits(requests_per_min=1), clock)
    clock.now += 61
    permit = book.ask(1, usd=1)
    assert isinstance(permit, Permit)
    assert isinstance(book.ask(1), Wait)
    book.cancel(permit)
    assert isinstance(book.ask(1), Permit)
    assert book.spent_usd == 0
    with pytest.raises(ValueError, match="settled before"):
        book.settle(permit)


def test_a_call_larger_than_a_minute_is_never_granted() -> None:
    assert isinstance(PermitBook(Limits(tokens_per_min=100), Clock()).ask(101), Spent)


@pytest.mark.parametrize(
    "bad",
    [
        {"requests_per_min": 0},
        {"tokens_per_min": float("nan")},
        {"max_concurrent": 0},
        {"max_usd": -1},
        {"slack_s": 60},
    ],
)
def test_limits_that_allow_nothing_are_refused(bad: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=next(iter(bad))):
        Limits(**bad)  # type: ignore[arg-type]
