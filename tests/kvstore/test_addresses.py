"""Nothing that asks nobody who is calling listens beyond this machine; with a secret, others are told where it is."""

import pytest
from pydantic import BaseModel, ValidationError

from perigee.kvstore.addresses import announced, checked_directory, checked_listen, join
from perigee.kvstore.config import StoreConfig
from perigee.kvstore.transfer.listening import split
from perigee.scheduler.config import ConductorConfig
from perigee.workers.config import WorkerConfig

SECRET = "a secret of some length"


@pytest.mark.parametrize(
    "address", ["unix:/run/perigee.sock", "127.0.0.1:0", "127.8.9.1:65535", "localhost:5000", "[::1]:0"]
)
def test_unix_sockets_and_loopback_are_allowed(address: str) -> None:
    assert checked_listen(address) == address


@pytest.mark.parametrize(
    "address",
    ["0.0.0.0:1", "[::]:0", "10.0.0.7:5000", "example.com:1"],
)
def test_what_others_can_reach_is_refused_without_a_secret(address: str) -> None:
    with pytest.raises(ValueError, match=r"allowed are unix:/path and host:port on loopback.*PERIGEE_CLUSTER_SECRET"):
        checked_listen(address)


@pytest.mark.parametrize("address", ["", ":5000", "127.0.0.1", "127.0.0.1:x", "[::1]:65536"])
def test_what_is_no_address_is_refused(address: str) -> None:
    with pytest.raises(ValueError, match="allowed are unix:/path and host:port"):
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
    with pytest.raises(ValidationError, match=r"listen\n.*needs the cluster's secret"):
        model(listen="10.0.0.7:0", **others)
    model(listen="10.0.0.7:0", cluster_secret=SECRET, **others)


def test_a_secret_that_is_short_is_none() -> None:
    with pytest.raises(ValidationError, match="16 characters or more") as refused:
        ConductorConfig(cluster_secret="hunter2")
    assert "hunter2" not in str(refused.value)


def test_who_listens_on_all_addresses_has_to_say_how_it_is_reached() -> None:
    others = {"socket": "/s", "directory": "unix:/d", "cluster_secret": SECRET, "listen": "0.0.0.0:7001"}
    with pytest.raises(ValidationError, match=r"advertise\n.*is needed beside listen"):
        StoreConfig(**others)
    assert StoreConfig(**others, advertise="10.0.0.7").advertise == "10.0.0.7"


def test_others_are_told_the_port_that_the_system_chose_and_the_host_that_they_can_reach() -> None:
    assert announced("127.0.0.1:0", 4711) == "127.0.0.1:4711"
    assert announced("0.0.0.0:0", 4711, "store-a") == "store-a:4711"
    assert announced("unix:/s", 1, "store-a") == "unix:/s"


@pytest.mark.parametrize("advertise", ["fd00::12", "[fd00::12]"])
def test_others_are_told_an_ipv6_address_in_brackets(advertise: str) -> None:
    assert announced("[::]:0", 7001, advertise) == "[fd00::12]:7001"
    assert announced(f"{advertise}:0", 7001) == "[fd00::12]:7001"
    assert split(join(advertise, 7003)) == ("fd00::12", 7003)


@pytest.mark.parametrize("target", ["unix:/d", "127.0.0.1:1", "redis://redis:6379/0?prefix=x&ttl_s=2", "rediss://r"])
def test_directories_are_grpc_targets_or_in_redis(target: str) -> None:
    assert checked_directory(target) == target


@pytest.mark.parametrize(
    ("target", "reason"),
    [
        ("", "allowed are"),
        ("http://redis", "allowed are"),
        ("redis://", "allowed are"),
        ("redis://user:secret@redis", "PERIGEE_DIRECTORY_PASSWORD_FILE"),
        ("redis://redis?ttl_s=0", "seconds above 0"),
        ("redis://redis?ttl_s=soon", "seconds above 0"),
    ],
)
def test_what_is_no_directory_is_refused(target: str, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        checked_directory(target)
