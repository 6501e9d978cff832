"""The e-detector: evidence by hand, what makes its false alarms rare by exact enumeration, its average run length by simulation."""

import itertools
import math
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from slm_swap.verdict.stats.e_detector import EDetector, Mixture, alternatives, bets


def evidence(xs, allowed: float) -> float:
    detector = EDetector(allowed, math.inf)
    for x in xs:
        detector.add(x)
    return detector.evidence


def by_definition(xs, allowed: float) -> float:
    """The mean over the alternatives of the sum, over each possible moment of the change, of the likelihood ratio since then."""
    total = 0.0
    for q in alternatives(allowed):
        ratios = [q / allowed if x else (1 - q) / (1 - allowed) for x in xs]
        total += sum(math.prod(ratios[start:]) for start in range(len(xs)))
    return total / len(alternatives(allowed))


# -- Known answers ---------------------------------------------------------------------------------------------------------------


def test_the_alternatives_of_one_half():
    odds = [1.25, 2, 3.2, 5.12, 8.192, 13.1072]  # the next, 20.97, is above 0.95 / 0.05
    assert alternatives(0.5) == pytest.approx([one / (1 + one) for one in odds])
    assert bets(0.5) == pytest.approx([4 * (one / (1 + one) - 0.5) for one in odds])
    assert alternatives(0.99) == [pytest.approx(0.995)]


def test_evidence_by_hand():
    b = bets(0.5)
    assert evidence([1], 0.5) == pytest.approx(sum(1 + one / 2 for one in b) / 6)
    assert evidence([1, 0], 0.5) == pytest.approx(sum((2 + one / 2) * (1 - one / 2) for one in b) / 6)
    assert evidence([0.5, 0.5, 0.5], 0.5) == pytest.approx(3)  # nothing won, nothing lost: one unit of money each


@pytest.mark.parametrize("allowed", [0.01, 0.05, 0.3, 0.97])
def test_evidence_of_yes_and_no_is_the_mixture_of_likelihood_ratios(allowed):
    for xs in itertools.product([0, 1], repeat=5):
        assert evidence(xs, allowed) == pytest.approx(by_definition(xs, allowed))


def test_the_alarm_comes_when_the_evidence_is_there_and_stays():
    detector, first = EDetector(0.1, 50), None
    for number in range(1, 30):
        if detector.add(1.0):
            assert first is None and evidence([1] * number, 0.1) >= 50 > evidence([1] * (number - 1), 0.1)
            first = number
    assert detector.alarm == first and detector.seen == 29 and detector.total == 29 and detector.evidence == pytest.approx(evidence([1] * first, 0.1))


def test_a_change_is_dated():
    detector = EDetector(0.05, 1000)
    for x in [0.0] * 40 + [1.0, 0.0] + [0.0] * 60 + [1.0] * 3:
        detector.add(x)
    assert detector.since == (103, 1.0)


@pytest.mark.parametrize("allowed", [0, 1, -0.1, 1.5, math.nan])
def test_nothing_can_be_found_beyond_everything(allowed):
    with pytest.raises(ValueError):
        EDetector(allowed, 10)


@pytest.mark.parametrize("x", [-0.01, 1.01, math.nan])
def test_an_observation_is_a_share(x):
    with pytest.raises(ValueError):
        EDetector(0.1, 10).add(x)


def test_a_mixture_is_the_mean_of_its_parts():
    mixture = Mixture([0.1, 0.5], 30)
    xs = [(0.3, 0.9), (1.0, 1.0), (0.0, 0.2)]
    assert [mixture.add(list(pair)) for pair in xs] == [False, False, False]
    assert mixture.evidence == pytest.approx((evidence([a for a, _ in xs], 0.1) + evidence([b for _, b in xs], 0.5)) / 2) and mixture.seen == 3
    while not mixture.add([1.0, 1.0]):
        pass
    assert mixture.alarm == mixture.seen and mixture.evidence >= 30 and not mixture.add([1.0, 1.0])


# -- False alarms ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("allowed", [0.02, 0.2, 0.6])
@pytest.mark.parametrize("of_allowed", [1.0, 0.5])
def test_evidence_less_the_time_is_a_supermartingale(allowed, of_allowed):
    """Over all sequences of yes and no: E[M_t | past] = M_{t-1} + 1 where the rate is what is allowed, less where it is lower."""
    rate = of_allowed * allowed
    for length in range(6):
        for xs in itertools.product([0, 1], repeat=length):
            expected = rate * evidence([*xs, 1], allowed) + (1 - rate) * evidence([*xs, 0], allowed)
            bound = evidence(xs, allowed) + 1
            assert expected == pytest.approx(bound) if of_allowed == 1 else expected < bound


@given(st.lists(st.floats(0, 1), max_size=8), st.floats(0.005, 0.9), st.floats(0, 1), st.floats(0, 1), st.floats(0, 1))
def test_it_is_one_for_any_distribution_between_0_and_1(past, allowed, low, high, share):
    """Two values, mixed so that their mean is at most what is allowed; one that depends on the past is one of these at each moment."""
    low, high = sorted((low, high))
    low = min(low, allowed)
    most = 1.0 if high <= allowed else (allowed - low) / (high - low)
    chance = share * most
    after = chance * evidence([*past, high], allowed) + (1 - chance) * evidence([*past, low], allowed)
    assert 0 <= after <= (evidence(past, allowed) + 1) * (1 + 1e-9)


@pytest.mark.parametrize("allowed", [0.3, 0.7])
def test_the_mean_run_is_no_shorter_than_promised_by_exact_enumeration(allowed):
    """E[min(tau, n)] >= E[M_min(tau, n)], over all 2^10 sequences, and so N times the probability of an alarm."""
    run, stopped, alarms, n, alarm_at = 0.0, 0.0, 0.0, 10, 12
    for xs in itertools.product([0, 1], repeat=n):
        detector = EDetector(allowed, alarm_at)
        probability = math.prod(allowed if x else 1 - allowed for x in xs)
        for x in xs:
            if detector.add(x):
                break
        run += probability * detector.seen
        stopped += probability * detector.evidence
        alarms += probability * (detector.alarm is not None)
    assert alarms > 0.1 and run == pytest.approx(stopped) and run >= alarm_at * alarms


@pytest.mark.parametrize("share", [True, False])
def test_parts_that_see_the_same_observation_share_its_money(share):
    """Over all sequences of a tool alone or both at once, and yes or no at just the allowed rate: the mean of the weighed evidence is the number of
    observations, so that the rate of false alarms holds. Without sharing it is more."""
    allowed, n, mean = 0.3, 4, 0.0
    for told in itertools.product([("a",), ("b",), ("a", "b")], repeat=n):
        for xs in itertools.product([0, 1], repeat=n):
            everything, parts = EDetector(allowed, math.inf), {name: EDetector(allowed, math.inf) for name in "ab"}
            for names, x in zip(told, xs, strict=True):
                everything.add(x)
                for name in names:
                    parts[name].add(x, 1 / len(names) if share else 1.0)
            chance = math.prod(allowed if x else 1 - allowed for x in xs) / 3**n
            mean += chance * (everything.evidence + sum(one.evidence for one in parts.values())) / 2
    assert mean == pytest.approx(n if share else n + n / 6)


@pytest.mark.parametrize("money", [0, -1, 1.5, math.nan])
def test_money_is_a_share(money):
    with pytest.raises(ValueError, match="above 0, and 1 at most"):
        EDetector(0.1, 10).add(1, money)


@pytest.mark.parametrize("parts", [0, 20])
def test_mean_run_lengths(parts):
    """At just the allowed rate: at least N observations, also where twenty parts have detectors of their own, at 2 N each as the one of all."""
    drawn, alarm_at, allowed, lengths = random.Random(5), 100, 0.1, []
    for _ in range(250):
        threshold = 2 * alarm_at if parts else alarm_at
        whole, own = EDetector(allowed, threshold), [EDetector(allowed, threshold) for _ in range(parts)]
        while True:
            x = float(drawn.random() < allowed)
            rung = [whole.add(x)] + ([own[int(parts * drawn.random() ** 2)].add(x)] if parts else [])
            if any(rung):
                break
        lengths.append(whole.seen)
    mean = sum(lengths) / len(lengths)
    error = (sum((length - mean) ** 2 for length in lengths) / len(lengths) ** 2) ** 0.5
    assert mean - 3 * error > alarm_at


def test_a_rise_is_found_long_before_a_false_alarm():
    drawn, delays = random.Random(6), []
    for _ in range(60):
        detector = EDetector(0.05, 10_000)
        while not detector.add(float(drawn.random() < (0.02 if detector.seen < 300 else 0.25))):
            pass
        delays.append(detector.alarm - 300)
    assert min(delays) > 0 and sorted(delays)[30] < 60
