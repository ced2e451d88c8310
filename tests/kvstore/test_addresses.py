"""Nothing that asks nobody who is calling listens beyond this machine."""

import pytest
from pydantic import BaseModel, ValidationError

from perigee.kvstore.addresses import checked_listen
from perigee.kvstore.config import StoreConfig
from perigee.scheduler.config import ConductorConfig
from perigee.workers.config import WorkerConfig


@pytest.mark.parametrize(
    "address", ["unix:/run/perigee.sock", "127.0.0.1:0", "127.8.9.1:65535", "localhost:5000", "[::1]:0"]
)
def test_unix_sockets_and_loopback_are_allowed(address: str) -> None:
    assert checked_listen(address) == address


@pytest.mark.parametrize(
    "address",
    ["", "0.0.0.0:1", "[::]:0", ":5000", "10.0.0.7:5000", "example.com:1", "127.0.0.1", "127.0.0.1:x", "[::1]:65536"],
)
def test_all_else_is_refused_with_the_reason(address: str) -> None:
    with pytest.raises(ValueError, match=r"allowed are unix:/path and host:port on loopback.*authentication"):
        checked_listen(address)


@pytest.mark.parametrize(
    ("model", "others"),
    [
        (StoreConfig, {"socket": "/s", "directory": "unix:/d"}),
        (ConductorConfig, {}),
        (WorkerConfig, {"id": "w", "role": "mixed", "model": "m", "store": "/s", "directory": "unix:/d"}),
    ],
)
def test_every_process_with_such_a_door_checks_it(model: type[BaseModel], others: dict[str, str]) -> None:
    model(listen="127.0.0.1:0", **others)
    with pytest.raises(ValidationError, match=r"listen\n.*links between hosts need authentication"):
        model(listen="0.0.0.0:0", **others)
