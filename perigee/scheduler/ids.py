"""What the scheduler calls things."""

from typing import NamedTuple, NewType

from perigee.workers.engine.sequence import Ref

ServerId = NewType("ServerId", str)  # one Attach stream of one front end
WorkerId = NewType("WorkerId", str)
NodeId = NewType("NodeId", str)  # a store node


class RequestKey(NamedTuple):
    """One choice of a request, whatever its attempt. The server is part of it: it is who chose the request's id."""

    server: ServerId
    request_id: str
    choice: int

    @classmethod
    def of(cls, server: ServerId, ref: Ref) -> "RequestKey":
        return cls(server, ref.request_id, ref.choice)
