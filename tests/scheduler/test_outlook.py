"""A decode worker's outlook: what is known of its load without a forecast bounds what a forecast says."""

import math
from random import Random

import numpy as np

from perigee.scheduler.cost import CostProfile
from perigee.scheduler.cost.model import WorkerCost
from perigee.scheduler.ids import RequestKey, ServerId
from perigee.scheduler.lengths import LengthModel
from perigee.scheduler.outlook import Coming, Outlook
from perigee.scheduler.worker_view import DecodeLoad

TIMES = np.array([0.0, 0.5, 2.0, 8.0, 64.0])


def key(number: int) -> RequestKey:
    return RequestKey(ServerId("s"), str(number), 0)


def coming(chance: Random, lengths: LengthModel, now: float) -> Coming:
    odds = lengths.odds(chance.randint(1, 5000), chance.randint(1, 500))
    bound_s = chance.choice((0.1, 0.2, math.inf))
    return Coming(now + chance.random(), odds, chance.randint(1, 5000), chance.randint(1, 40), bound_s, 1.0)


def test_no_forecast_exceeds_the_most_that_can_be_there() -> None:
    chance, lengths = Random(3), LengthModel()
    outlook, tightest_s = Outlook(WorkerCost(CostProfile()), 0.0), dict[RequestKey, float]()
    for number in range(300):
        now = number / 10
        lengths.observe(chance.randint(1, 5000), 500, "", chance.randint(1, 500))
        comes = coming(chance, lengths, now)
        outlook.add(key(number), comes)
        tightest_s[key(number)] = comes.tbt_s
        outlook.join(key(number - 5), now)
        if number >= 20:
            gone = chance.choice(list(tightest_s))
            outlook.remove(gone)
            del tightest_s[gone]
        most, load = outlook.most, outlook.at(now + TIMES, lengths, now)
        assert load.batch.max() <= most.sequences + 1e-9
        assert load.places.max() <= most.sequences + 1e-9
        assert load.pages.max() <= most.pages * (1 + 1e-9)
        assert load.context_tokens.max() <= most.context_tokens * (1 + 1e-9)
        assert outlook.tightest_tbt_s == min(tightest_s.values())


def test_nothing_is_left_of_what_was_removed() -> None:
    chance, lengths = Random(3), LengthModel()
    outlook = Outlook(WorkerCost(CostProfile()), 0.0)
    for number in range(20):
        outlook.add(key(number), coming(chance, lengths, 0.0))
    for number in range(20):
        outlook.remove(key(number))
    assert outlook.most == DecodeLoad()
    assert outlook.tightest_tbt_s == math.inf
