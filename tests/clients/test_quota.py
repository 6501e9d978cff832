"""The limiter, in virtual time: a server that meters, and a client of many rows at once."""

import heapq
import math
from collections import Counter
from itertools import count
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from slm_swap.clients.quota import Quota, asked_wait
from slm_swap.demo.azure_simulator import Bucket

LIMIT = 256  # of each reply, in tokens


class World:
    """A server with quotas, a client that keeps `concurrency` rows under way through a Quota, and perhaps a second, unsuspecting one.

    Requests take `way` seconds (up to twice as much) each way and are answered after about `latency`.
    """

    def __init__(self, seed=0, *, requests=None, tokens=None, window=60.0, latency=0.5, way=0.02, concurrency=32, second=0.0, guess=1.0, limits=True):
        self.now, self.events, self.order, self.rng = 0.0, [], count(), Random(seed)
        self.quotas = {name: value for name, value in (("requests", requests), ("tokens", tokens)) if value}
        self.buckets = {name: Bucket(value, window, lambda: self.now) for name, value in self.quotas.items()}
        self.latency, self.way, self.concurrency, self.guess, self.limits = latency, way, concurrency, guess, limits
        self.counts, self.refusals, self.queue, self.looking = Counter(), [], [], False
        self.quota = Quota(lambda: self.now)
        if second:
            least = min(value / (1 if name == "requests" else 300 + LIMIT) for name, value in self.quotas.items())
            self.later(latency, self.ask_second, 60 / least / second)

    def later(self, seconds, function, *arguments):
        heapq.heappush(self.events, (self.now + seconds, next(self.order), function, arguments))

    def run(self, seconds):
        self.ask(self.tokens())  # one goes ahead, as in AzureClient
        while self.events and self.events[0][0] <= seconds:
            self.now, _, function, arguments = heapq.heappop(self.events)
            function(*arguments)
        return self

    def tokens(self):
        return self.rng.randint(150, 450) + LIMIT

    def travel(self):
        return self.way * self.rng.uniform(1, 2)

    # The client

    def ask(self, tokens):
        self.queue.append(tokens)
        if not self.looking:
            self.look()

    def look(self):
        self.looking = False
        while self.queue:
            wait = self.quota.wait(self.queue[0] * self.guess)
            if wait > 0:
                self.looking = True
                self.later(min(wait, 0.05) + self.rng.uniform(0, 0.002), self.look)
                return
            tokens = self.queue.pop(0)
            self.later(self.travel(), self.arrive, tokens, self.quota.take(tokens * self.guess))

    def hear(self, tokens, marks, status, headers, wait):
        self.quota.told(marks, status, headers)
        if status == 429:
            self.later(wait, self.ask, tokens)
            return
        rows, self.concurrency = (self.concurrency, 1) if self.counts["heard"] == 0 else (1, 1)
        self.counts["heard"] += 1
        for _ in range(rows):
            self.ask(self.tokens())

    # The server

    def meter(self, tokens):
        charges = {"requests": 1, "tokens": tokens}
        wait = max(bucket.wait(charges[name]) for name, bucket in self.buckets.items())
        if wait <= 0:
            for name, bucket in self.buckets.items():
                bucket.take(charges[name])
        return wait

    def arrive(self, tokens, marks):
        wait = self.meter(tokens)
        headers = {f"x-ratelimit-remaining-{name}": str(int(bucket.level)) for name, bucket in self.buckets.items()}
        if self.limits:
            headers |= {f"x-ratelimit-limit-{name}": str(value) for name, value in self.quotas.items()}
        if wait > 0:
            self.refusals.append(self.now)
            asked = {"retry-after-ms": str(math.ceil(wait * 1000))}
            self.later(self.travel(), self.hear, tokens, marks, 429, headers | asked, wait)
        else:
            self.counts["answered"] += 1
            self.later(self.travel() + self.latency * self.rng.uniform(0.7, 1.3), self.hear, tokens, marks, 200, headers, 0.0)

    def ask_second(self, seconds):
        self.meter(self.tokens())
        self.later(seconds * self.rng.uniform(0.8, 1.2), self.ask_second, seconds)

    @property
    def used(self):
        """The share of what was permitted, of the quota that binds."""
        return max(bucket.used / bucket.permitted for bucket in self.buckets.values())

    @property
    def refused(self):
        return len(self.refusals) / (self.counts["answered"] + len(self.refusals))


QUOTAS = [{"requests": 120}, {"requests": 600}, {"requests": 3000}, {"tokens": 60_000}, {"tokens": 600_000}, {"requests": 600, "tokens": 300_000}]


@pytest.mark.parametrize("quotas, window", [(quotas, window) for quotas in QUOTAS for window in (1.0, 10.0, 60.0)])
def test_a_quota_is_used_up_and_not_overrun(quotas, window):
    if quotas == {"tokens": 60_000} and window == 1.0:
        pytest.skip("a bucket of hardly two requests, as no deployment has one")
    for seed, guess in enumerate((1.0, 0.95, 1.05)):  # tokens estimated right, too low, too high
        world = World(seed, **quotas, window=window, latency=0.3, concurrency=64, guess=guess).run(90)
        assert world.used >= 0.95 and world.refused <= 0.01


@pytest.mark.parametrize("requests, window", [(60, 1.0), (90, 1.0), (20, 3.0), (6, 10.0)])
def test_a_bucket_of_one_request_whose_limit_is_not_told_is_tried_out(requests, window):
    """Nothing ever remains in it, whatever it refills by: a client that takes it for a minute's quota would ask up to 60 times too slowly."""
    for latency in (0.05, 4.0):
        world = World(1, requests=requests, window=window, latency=latency, limits=False).run(600)
        assert world.used >= 0.88 and len(world.refusals) <= 8


@pytest.mark.parametrize("quotas, window", [(quotas, 10.0) for quotas in QUOTAS[1:]] + [({"requests": 600}, 1.0), ({"requests": 3000}, 1.0)])
def test_a_second_client_is_made_room_for(quotas, window):
    world = World(7, **quotas, window=window, concurrency=64, second=1 / 3).run(300)
    assert world.used >= 0.95 and world.refused <= 0.01


@settings(max_examples=40, deadline=None)
@given(
    requests=st.integers(120, 6000),
    latency=st.floats(0.05, 3),
    window=st.sampled_from([10.0, 60.0]),
    limits=st.booleans(),
    way=st.floats(0.001, 0.04),
    seed=st.integers(0, 99),
)
def test_without_a_second_client_next_to_nothing_is_refused(requests, latency, window, limits, way, seed):
    world = World(seed, requests=requests, latency=latency, window=window, limits=limits, way=way).run(40)
    assert world.refused <= 0.01
    possible = 32 / (1.1 * latency + 4 * way) * 40  # by the concurrency
    if possible > 3 * requests:
        assert world.used >= 0.95 - (latency * 1.3 + 1) / (40 + window)  # less the first row's time, when it goes alone


def headers(remaining, what="requests", **more):
    return {f"x-ratelimit-remaining-{what}": str(remaining)} | {name.replace("_", "-"): value for name, value in more.items()}


class Clock:
    now = 100.0

    def __call__(self):
        return self.now


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def quota(clock):
    return Quota(clock)


def test_nothing_is_held_back_where_the_server_tells_nothing(quota):
    marks = [quota.take(1e9) for _ in range(1000)]
    assert quota.wait(1e9) == 0
    for mark in marks:
        quota.told(mark, 200, {})
        quota.told(mark, 500, {"x-ratelimit-remaining-requests": "-1", "x-ratelimit-remaining-tokens": "many"})
    assert quota.wait(1e9) == 0


def test_what_remains_is_sent_and_then_the_refill_is_waited_for(quota, clock):
    quota.told(quota.take(10), 200, headers(59, x_ratelimit_limit_requests="60"))
    sent = 0
    while quota.wait(10) == 0:
        quota.take(10)
        sent += 1
    assert sent == 57  # 59, less the reserve of 1.8
    wait = quota.wait(10)
    assert 0 < wait <= 1  # one a second
    clock.now += wait
    assert quota.wait(10) == pytest.approx(0, abs=1e-9)


def test_tokens_are_a_quota_of_their_own(quota):
    quota.told(quota.take(400), 200, headers(600, "tokens"))
    assert quota.wait(500) == 0 and quota.wait(600) > 0  # of 600 left, 30 are the reserve
    assert 0 < quota.wait(5000) == quota.wait(1000)  # larger than the bucket: a full one is enough


def test_one_who_is_told_to_wait_makes_all_wait_and_one_goes_ahead(quota, clock):
    first, second = quota.take(100), quota.take(200)
    quota.told(first, 200, headers(1000, "tokens"))
    quota.told(second, 429, headers(150, "tokens", retry_after="3"))
    assert quota.wait(1) == 3
    clock.now += 2
    assert quota.wait(200) == 1
    clock.now += 1
    assert quota.wait(200) == 0 and quota.wait(201) > 0
    quota.take(200)
    assert quota.wait(1) > 0  # the others only as it refills


def test_all_wait_too_where_only_the_refusal_tells_anything(quota, clock):
    quota.told(quota.take(100), 429, {"retry-after-ms": "2500"})
    assert quota.wait(1) == quota.wait(1000) == 2.5
    clock.now += 2.5
    assert quota.wait(1000) == 0


def test_a_refusal_of_one_quota_says_nothing_against_the_other(quota, clock):
    quota.told(quota.take(100), 200, headers(1000, "tokens") | headers(50))
    quota.told(quota.take(2000), 429, headers(1000, "tokens", retry_after_ms="1500") | headers(49))
    clock.now += 1.5
    quota.take(2000)
    quota.told(quota.take(0), 200, headers(48))  # of tokens nothing any more
    assert quota.wait(5000) == 0


def test_a_wait_that_ends_the_row_holds_nobody(quota):
    quota.told(quota.take(1), 429, {"retry-after": "86400"})
    assert quota.wait(1) == 0


def test_answers_out_of_order(quota, clock):
    old = quota.take(1)
    clock.now += 5
    quota.told(quota.take(1), 200, headers(20))
    quota.told(old, 200, headers(90))  # it was so five seconds ago
    assert [quota.take(1) for _ in range(17)] and quota.wait(1) > 0


def test_a_request_without_an_answer_is_not_waited_for(quota, clock):
    """While it is under way, the answers to those that were sent with it may be from before it came in."""
    quota.told(quota.take(1), 200, headers(9))
    clock.now += 1
    _, *others = [quota.take(1) for _ in range(9)]
    for number, marks in enumerate(others):
        quota.told(marks, 200, headers(8 - number))  # the first one never came in
    before = quota.wait(1)
    quota.lost()
    assert quota.wait(1) < before


def test_a_minute_that_starts_anew_is_found_out_about():
    """A server that counts to its limit and starts again with each minute, as Azure says of tokens."""
    clock, rng = Clock(), Random(1)
    quota, used, refused, minute, limit = Quota(clock), Counter(), 0, 0, 30_000
    while clock.now < 700:
        tokens = rng.randint(400, 700)
        wait = quota.wait(tokens)
        clock.now += wait or 0.1
        if wait:
            continue
        mark, minute = quota.take(tokens), int(clock.now // 60)
        if used[minute] + tokens > limit:
            refused += 1
            quota.told(mark, 429, headers(limit - used[minute], "tokens", retry_after=str(60 - clock.now % 60)))
        else:
            used[minute] += tokens
            quota.told(mark, 200, headers(limit - used[minute], "tokens"))
    whole = [used[number] for number in range(2, 11)]
    assert min(whole) > 0.85 * limit and refused <= 12


@pytest.mark.parametrize(
    "told, seconds",
    [
        ({"retry-after-ms": "1500", "retry-after": "2"}, 1.5),
        ({"retry-after": "2"}, 2.0),
        ({"retry-after": "0.25"}, 0.25),
        ({"x-ratelimit-reset-tokens": "55"}, 55.0),
        ({"x-ratelimit-reset-requests": "6m0s", "x-ratelimit-reset-tokens": "20ms"}, 360.0),
        ({"retry-after": "Wed, 21 Oct 2026 07:28:00 GMT", "x-ratelimit-reset-tokens": "1h2m3.5s"}, 3723.5),
        ({"retry-after": "Wed, 21 Oct 2026 07:28:00 GMT"}, None),
        ({"retry-after": "-1", "x-ratelimit-reset-tokens": "soon"}, None),
        ({}, None),
    ],
)
def test_when_to_come_back(told, seconds):
    assert asked_wait(told) == seconds
