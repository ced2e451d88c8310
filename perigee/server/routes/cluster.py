"""GET /cluster: who is in the cluster and what they carry."""

from google.protobuf.json_format import MessageToDict
from google.protobuf.message import Message
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from perigee.kvstore import directory_pb2
from perigee.scheduler import scheduler_pb2 as pb
from perigee.server.errors import Json, Unavailable
from perigee.server.gateway import Gateway


def routes(gateway: Gateway) -> list[Route]:
    async def cluster(request: Request) -> Response:
        gateway.tenants.authenticate(request.headers.get("authorization"))
        state = await gateway.conductor.refresh()
        if state is None:
            raise Unavailable("the Conductor has not been heard of yet")
        return JSONResponse(_cluster(state, gateway.conductor.reachable))

    return [Route("/cluster", cluster)]


def _cluster(state: pb.ClusterState, fresh: bool) -> Json:
    shadow = {"shadow": _fields(state.shadow, without=())} if state.HasField("shadow") else {}
    return {
        "ready": state.ready,
        "fresh": fresh,  # else the Conductor is away and this is what it said last
        "epoch": state.epoch,
        "model": _fields(state.card, without=("namespace",)) | {"namespace": state.card.namespace.hex()},
        "workers": [_worker(worker) for worker in state.workers],
        "stores": [_store(store) for store in state.stores],
        **shadow,
    }


def _worker(worker: pb.WorkerState) -> Json:
    load = _fields(worker.report, without=("worker_id", "incarnation", "role", "card", "draining"))
    report = {"role": worker.report.role, "draining": worker.report.draining, "store": worker.member.store}
    return _member(worker.member) | report | {"load": load}


def _store(store: pb.StoreState) -> Json:
    load = _fields(store.status, without=("node_id", "incarnation"))
    return _member(store.member) | {"role": "store", "load": load}


def _member(member: directory_pb2.Member) -> Json:
    return {
        "id": member.id,
        "incarnation": member.incarnation,
        "pid": member.pid,
        "host": member.host,
        "address": member.address,
    }


def _fields(message: Message, without: tuple[str, ...]) -> Json:
    """All other fields of a message by their names in the contract; numbers as numbers, where JSON allows it."""
    fields = MessageToDict(message, preserving_proto_field_name=True, always_print_fields_with_no_presence=True)
    return {name: _number(value) for name, value in fields.items() if name not in without}


def _number(value: object) -> object:
    # protobuf writes 64-bit integers as strings, for JavaScript's sake.
    return int(value) if isinstance(value, str) and value.isdecimal() else value
