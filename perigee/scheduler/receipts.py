"""What was decided about each request, why, and what came of it: one receipt a choice, with all its attempts.

A receipt keeps what the decision already made, by reference; it is written out only when somebody asks for it, by
`receipt_json`. It never keeps block keys: a long prompt has thousands of bytes of them.
"""

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from enum import StrEnum

from perigee.scheduler.commands import Command, Dispatch, Reject, RejectReason
from perigee.scheduler.events import (
    Cancelled,
    Failed,
    Finished,
    Joined,
    PrefillDone,
    RequestArrived,
    RequestEvent,
)
from perigee.scheduler.ids import ServerId
from perigee.scheduler.plan import Plan
from perigee.scheduler.policies import PolicyNames
from perigee.scheduler.shadow import Verdict
from perigee.scheduler.slo import Slo

# A request that failed or was turned away on its way may be submitted again for this long; then it counts as over.
PATIENCE_S = 30.0

# Of one request's attempts the first and the last so many are kept.
MAX_ATTEMPTS = 16

DEFAULT_LIMIT = 4096


class Outcome(StrEnum):
    """What became of a request, or of one attempt at it."""

    RUNNING = "running"
    FINISHED = "finished"
    REJECTED = "rejected"
    FAILED = "failed"
    CANCELLED = "cancelled"
    LOST = "lost"  # its server's stream broke or asked again, and nothing was heard of it since


@dataclass(slots=True)
class Attempt:
    """One decision, at `at` of the Conductor's clock, and what became of it.

    `plan` is None where no policy was asked, because no worker could have served the request. A `rejection` may come at
    arrival or, with `prefill_done` set, when the prompt was computed.
    """

    number: int
    at: float
    age_s: float
    num_tokens: int
    plan: Plan | None
    dispatch: Dispatch | None
    rejection: Reject | None
    shadow: Verdict | None = None
    prefill_done: PrefillDone | None = None
    joined_at: float | None = None
    finished: Finished | None = None
    failed: Failed | None = None
    outcome: Outcome = Outcome.RUNNING
    ended_at: float | None = None

    def end(self, outcome: Outcome, now: float) -> None:
        self.outcome, self.ended_at = outcome, now


@dataclass(slots=True)
class Receipt:
    """All attempts at one choice of a request, the first one first. `Receipts` fills it."""

    request_id: str
    choice: int
    server: ServerId
    tenant: str
    priority: int
    slo: Slo
    max_tokens: int
    policies: PolicyNames
    attempts: list[Attempt] = field(default_factory=list)
    forgotten_attempts: int = 0  # between the first and the others
    outcome: Outcome = Outcome.RUNNING

    def attempt(self, number: int) -> Attempt | None:
        """The latest attempt of this number."""
        return next((attempt for attempt in reversed(self.attempts) if attempt.number == number), None)

    def add(self, attempt: Attempt) -> None:
        if len(self.attempts) == MAX_ATTEMPTS:
            del self.attempts[1]
            self.forgotten_attempts += 1
        self.attempts.append(attempt)


_Key = tuple[str, int]  # request id, choice


class Receipts:
    """Receipts of all requests in flight, and of the last `limit` that ended."""

    def __init__(self, policies: PolicyNames, limit: int = DEFAULT_LIMIT) -> None:
        self.limit = limit
        self._policies = policies
        self._by_id: dict[str, dict[int, Receipt]] = {}
        self._over: dict[_Key, None] = {}  # in order of their ends
        self._waiting: dict[_Key, float] = {}  # for another attempt, since when; in that order
        self._news: deque[Receipt] = deque(maxlen=limit)  # those that ended and were not taken yet

    def __len__(self) -> int:
        return sum(map(len, self._by_id.values()))

    def find(self, request_id: str) -> list[Receipt]:
        """Those of a request's choices that are kept, in order of the choices."""
        return [receipt for _, receipt in sorted(self._by_id.get(request_id, {}).items())]

    def take_ended(self) -> list[Receipt]:
        """Those that ended since the last call, or the last `limit` of them."""
        if not self._news:
            return []
        ended = list(self._news)
        self._news.clear()
        return ended

    # ---- what the Conductor tells

    def decided(
        self, request: RequestArrived, answer: Dispatch | Reject, plan: Plan | None, shadow: Verdict | None, now: float
    ) -> None:
        """A request arrived, was planned for, and got this answer."""
        key = (request.ref.request_id, request.ref.choice)
        receipt = self._receipt(key, request)
        if receipt.attempts and receipt.attempts[-1].outcome is Outcome.RUNNING:  # this one takes its place
            receipt.attempts[-1].end(Outcome.LOST, now)
        dispatch = answer if isinstance(answer, Dispatch) else None
        rejection = answer if isinstance(answer, Reject) else None
        number = request.ref.attempt
        attempt = Attempt(number, now, request.age_s, request.num_tokens, plan, dispatch, rejection, shadow)
        receipt.add(attempt)
        if rejection is not None:
            self._reject(key, receipt, attempt, rejection, now)

    def heard(self, event: RequestEvent, answer: list[Command], now: float) -> None:
        """Something happened to a dispatched attempt, and `answer` is what the Conductor said to that."""
        key = (event.ref.request_id, event.ref.choice)
        receipt = self._by_id.get(key[0], {}).get(key[1])
        attempt = receipt.attempt(event.ref.attempt) if receipt is not None else None
        if receipt is None or attempt is None:  # of a Conductor before this one, or forgotten
            return
        match event:
            case PrefillDone():
                attempt.prefill_done = event
                for rejection in answer:
                    if isinstance(rejection, Reject):
                        self._reject(key, receipt, attempt, rejection, now)
            case Joined():
                attempt.joined_at = now
            case Finished():
                attempt.finished = event
                attempt.end(Outcome.FINISHED, now)
                self._close(key, receipt, attempt)
            case Failed():
                attempt.failed = event
                attempt.end(Outcome.FAILED, now)
                self._wait(key, receipt, attempt)
            case Cancelled():
                attempt.end(Outcome.CANCELLED, now)
                self._close(key, receipt, attempt)

    def server_lost(self, server: ServerId, now: float) -> None:
        """Its requests may go on, and be heard of again over another stream."""
        for key, receipt in self._open():
            attempt = receipt.attempts[-1]
            if receipt.server == server and attempt.outcome is Outcome.RUNNING:
                attempt.end(Outcome.LOST, now)
                self._wait(key, receipt, attempt)

    def pass_time(self, now: float) -> None:
        """Ends what has waited in vain for another attempt."""
        while self._waiting:
            key, since = next(iter(self._waiting.items()))
            if now - since <= PATIENCE_S:
                return
            receipt = self._by_id[key[0]][key[1]]
            self._close(key, receipt, receipt.attempts[-1])

    # ---- the books

    def _receipt(self, key: _Key, request: RequestArrived) -> Receipt:
        """The choice's receipt, to which another attempt is about to be added."""
        choices = self._by_id.setdefault(key[0], {})
        receipt = choices.get(key[1])
        if receipt is None or receipt.tenant != request.tenant:
            receipt = choices[key[1]] = Receipt(
                key[0],
                key[1],
                request.server,
                request.tenant,
                request.priority,
                request.slo,
                request.max_tokens,
                self._policies,
            )
        receipt.server = request.server
        receipt.outcome = Outcome.RUNNING
        self._over.pop(key, None)
        self._waiting.pop(key, None)
        return receipt

    def _reject(self, key: _Key, receipt: Receipt, attempt: Attempt, rejection: Reject, now: float) -> None:
        """A server gives up a request whose first choice is turned away at once, and tries again with what it has
        begun to answer."""
        attempt.rejection = rejection
        attempt.end(Outcome.REJECTED, now)
        is_new = attempt.number == 0 and receipt.choice == 0
        if is_new or rejection.reason is RejectReason.TOO_LARGE:
            self._close(key, receipt, attempt)
        else:
            self._wait(key, receipt, attempt)

    def _wait(self, key: _Key, receipt: Receipt, attempt: Attempt) -> None:
        if attempt is receipt.attempts[-1] and attempt.ended_at is not None and key not in self._over:
            self._waiting.setdefault(key, attempt.ended_at)

    def _close(self, key: _Key, receipt: Receipt, attempt: Attempt) -> None:
        """The receipt's outcome is that of its last attempt."""
        if attempt is not receipt.attempts[-1]:
            return
        receipt.outcome = attempt.outcome
        self._waiting.pop(key, None)
        if key in self._over:  # and was said to have ended: this comes late
            return
        self._over[key] = None
        self._news.append(receipt)
        if len(self._over) > self.limit:
            self._forget(next(iter(self._over)))

    def _forget(self, key: _Key) -> None:
        del self._over[key]
        choices = self._by_id[key[0]]
        del choices[key[1]]
        if not choices:
            del self._by_id[key[0]]

    def _open(self) -> Iterator[tuple[_Key, Receipt]]:
        for request_id, choices in self._by_id.items():
            for choice, receipt in choices.items():
                if (request_id, choice) not in self._over:
                    yield (request_id, choice), receipt
