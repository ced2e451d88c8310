"""Whom one believes in while the directory comes and goes."""

from dataclasses import replace

from perigee.kvstore.members import Member
from perigee.kvstore.membership import Membership

A = Member("a", "1", "store", "127.0.0.1:1", 1, "here")
B = Member("b", "1", "worker", "127.0.0.1:2", 2, "here", "a")


def test_what_the_directory_says_holds_sorted_by_id() -> None:
    membership = Membership(grace_s=10.0)
    assert membership.seen([B, A], now=0.0) == (A, B)
    assert membership.seen([B], now=0.1) == (B,)
    assert membership.seen([], now=0.2) == ()


def test_after_an_outage_nobody_is_taken_to_have_left_for_a_while() -> None:
    membership = Membership(grace_s=10.0)
    membership.seen([A, B], now=0.0)
    membership.lost_sight()
    membership.lost_sight()
    assert membership.seen([], now=1000.0) == (A, B)
    assert membership.seen([A], now=1009.9) == (A, B)
    assert membership.seen([A], now=1010.0) == (A,)


def test_after_an_outage_those_who_restarted_and_those_who_are_new_count_at_once() -> None:
    membership = Membership(grace_s=10.0)
    membership.seen([A], now=0.0)
    membership.lost_sight()
    restarted = replace(A, incarnation="2")
    assert membership.seen([restarted, B], now=6.0) == (restarted, B)


def test_a_watcher_that_starts_during_an_outage_believes_what_it_is_told_first() -> None:
    membership = Membership(grace_s=10.0)
    membership.lost_sight()
    assert membership.seen([A], now=1.0) == (A,)
