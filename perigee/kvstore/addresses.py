"""Where a process listens and is found, and the secrets that it shares with the others of its cluster."""

import ipaddress
from typing import Annotated
from urllib.parse import parse_qsl, urlsplit

from pydantic import AfterValidator, BaseModel, Field, SecretStr, ValidationInfo

from perigee.kvstore.access import Access

_MIN_SECRET_CHARS = 16
NEEDS_SECRET = "needs the cluster's secret, by PERIGEE_CLUSTER_SECRET_FILE or PERIGEE_CLUSTER_SECRET"
_NO_SECRET = (
    "allowed are unix:/path and host:port on loopback, such as 127.0.0.1:0: to be reached from other hosts a process"
    f" {NEEDS_SECRET}"
)
_REDIS_SCHEMES = ("redis", "rediss")
_DIRECTORIES = "allowed are a gRPC target, such as host:port or unix:/path, and redis://host:port/0?prefix=NAME&ttl_s=5"


def _checked_secret(secret: SecretStr | None) -> SecretStr | None:
    if secret is not None and len(secret.get_secret_value()) < _MIN_SECRET_CHARS:
        # Without the value: errors are printed.
        raise ValueError(f"allowed are {_MIN_SECRET_CHARS} characters or more")
    return secret


class ClusterProcess(BaseModel, frozen=True, extra="forbid", hide_input_in_errors=True):
    """What the configurations of all processes of a cluster begin with."""

    cluster_secret: Annotated[SecretStr | None, AfterValidator(_checked_secret)] = Field(
        None, description="Shared by all processes of the cluster, which ask each other for it."
    )

    @property
    def access(self) -> Access:
        return Access(cluster_secret=_revealed(self.cluster_secret).encode())


class DirectoryUser(ClusterProcess, frozen=True, extra="forbid"):
    """A process that is in the cluster's directory, or reads it."""

    directory_password: SecretStr | None = Field(None, description="Of the directory, where that is in Redis.")

    @property
    def access(self) -> Access:
        password = _revealed(self.directory_password)
        return Access(cluster_secret=super().access.cluster_secret, directory_password=password)


def checked_listen(address: str, has_secret: bool = False) -> str:
    """`address` itself, a gRPC bind target. Without a cluster secret only this machine may be able to reach it.

    Raises ValueError for any other.
    """
    if address.startswith("unix:/"):
        return address
    host, _, port = address.rpartition(":")
    if not host or not (port.isascii() and port.isdigit() and int(port) <= 65535):
        raise ValueError("allowed are unix:/path and host:port, such as 127.0.0.1:0")
    if not is_loopback(host) and not has_secret:
        raise ValueError(_NO_SECRET)
    return address


def checked_directory(target: str) -> str:
    """`target` itself: where the directory is. Raises ValueError for what is no such place."""
    scheme, separator, _ = target.partition("://")
    if not target or (separator and scheme not in _REDIS_SCHEMES):
        raise ValueError(_DIRECTORIES)
    if separator:
        _check_redis(target)
    return target


def is_redis(target: str) -> bool:
    """Whether a directory is in Redis, rather than a gRPC service."""
    return target.partition("://")[0] in _REDIS_SCHEMES


def is_loopback(host: str) -> bool:
    """Whether `host` is this machine alone. Of names only localhost is taken for that."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(without_brackets(host)).is_loopback
    except ValueError:
        return False


def without_brackets(host: str) -> str:
    """`host`, of which an IPv6 address may be in brackets, as it is beside a port."""
    return host.removeprefix("[").removesuffix("]")


def join(host: str, port: int) -> str:
    """`host:port`, where an IPv6 address, in brackets or not, is in brackets."""
    host = without_brackets(host)
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def announced(listen: str, port: int, advertise: str = "") -> str:
    """The gRPC target to tell others: `listen`, with the port that the system chose, at the host `advertise` if any."""
    if listen.startswith("unix:"):
        return listen
    return join(advertise or listen.rpartition(":")[0], port)


def _listen_of(address: str, info: ValidationInfo) -> str:
    return checked_listen(address, bool(info.data.get("cluster_secret")))


Listen = Annotated[str, AfterValidator(_listen_of)]
"""The type of a `listen`, in a configuration whose `cluster_secret` comes before it."""

DirectoryTarget = Annotated[str, AfterValidator(checked_directory)]


def checked_advertise(host: str, info: ValidationInfo) -> str:
    """`host` itself. Raises ValueError if there is none and `listen` names no host that others could use."""
    listen = info.data.get("listen", "")
    if not host and listen.rpartition(":")[0] in ("0.0.0.0", "[::]"):
        raise ValueError(f"is needed beside listen {listen!r}: the host or address under which others reach this one")
    return host


Advertise = Annotated[str, AfterValidator(checked_advertise), Field(validate_default=True)]
"""The type of an `advertise`, in a configuration whose `listen` comes before it."""


def _check_redis(url: str) -> None:
    parts = urlsplit(url)
    if parts.password is not None:
        raise ValueError("a password in a URL is in every process list: set PERIGEE_DIRECTORY_PASSWORD_FILE instead")
    if not parts.hostname:
        raise ValueError(_DIRECTORIES)
    ttl = dict(parse_qsl(parts.query)).get("ttl_s", "1")
    if not ttl.replace(".", "", 1).isdigit() or float(ttl) <= 0:
        raise ValueError(f"ttl_s: {ttl!r}: allowed are seconds above 0")


def _revealed(secret: SecretStr | None) -> str:
    return secret.get_secret_value() if secret else ""
