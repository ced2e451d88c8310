"""Who is asking: API keys, and what keeps one tenant's cached blocks from another."""

import hashlib
import hmac
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from perigee.kvstore.blocks import NO_SALT
from perigee.scheduler.slo import MAX_PRIORITY, MIN_PRIORITY
from perigee.server.errors import Unauthorized

_PRIORITIES = {str(value) for value in range(-MAX_PRIORITY, 1 - MIN_PRIORITY)}


class KeysFileError(Exception):
    """Raised when the file of API keys cannot be read or says nothing."""


@dataclass(frozen=True, slots=True)
class Tenant:
    """Whoever sent a request, as far as an API key tells. `salt` goes into the keys of all its blocks, so no other
    tenant can hit them. The lowest `priority` that it may ask for is `most_urgent`; what does not say its
    `service_tier` has the key's, or the server's default.
    """

    name: str
    salt: bytes
    most_urgent: int = 0
    service_tier: str = ""


# Nobody is to be protected from it, so it may have any priority.
ANONYMOUS = Tenant("anonymous", NO_SALT, most_urgent=-MAX_PRIORITY)


class Tenants:
    """All that may ask. With no keys at all, anybody may, and everybody shares the cache."""

    def __init__(self, keys: Mapping[str, Tenant]) -> None:
        """`keys` has the tenant of each API key; several keys may belong to one tenant."""
        # Kept by digest: a lookup then takes a time that says nothing about how much of a guessed key was right.
        self._tenants = {_digest(key): tenant for key, tenant in keys.items()}

    @classmethod
    def load(cls, path: Path | None, tiers: Collection[str] = ()) -> "Tenants":
        """Reads `name:key` lines. After the key there may be `most_urgent=N`, the lowest priority that its requests may
        ask for (0 if it does not say), and `service_tier=NAME`, one of `tiers`, for requests that do not say. Empty
        lines and those that begin with # count for nothing. Raises KeysFileError.
        """
        if path is None:
            return cls({})
        try:
            lines = path.read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise KeysFileError(f"api_keys_file: {str(path)!r} cannot be read: {error}") from error
        keys = dict(_entry(path, number, line, tiers) for number, line in enumerate(lines, 1) if _says_something(line))
        if not keys:
            raise KeysFileError(f"api_keys_file: {str(path)!r} has no `name:key` line")
        return cls(keys)

    def authenticate(self, authorization: str | None) -> Tenant:
        """The tenant of an `Authorization: Bearer …` header. Raises Unauthorized."""
        if not self._tenants:
            return ANONYMOUS
        scheme, _, key = (authorization or "").partition(" ")
        tenant = self._tenants.get(_digest(key.strip())) if scheme.lower() == "bearer" else None
        if tenant is None:
            raise Unauthorized("a known API key is needed, as the header Authorization: Bearer KEY")
        return tenant


def tenant_salt(name: str) -> bytes:
    """The same on every server and after a change of keys. It need not be secret: no client can send a salt."""
    return hmac.digest(b"perigee tenant", name.encode(), "sha256")


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode()).digest()


def _says_something(line: str) -> bool:
    return bool(line.strip()) and not line.lstrip().startswith("#")


def _entry(path: Path, number: int, line: str, tiers: Collection[str]) -> tuple[str, Tenant]:
    """A key and its tenant. Errors do not quote the key: it is a secret."""
    where = f"api_keys_file: {str(path)!r}, line {number}"
    name, colon, rest = (part.strip() for part in line.partition(":"))
    key, *options = rest.split() or [""]
    if not (name and colon and key):
        raise KeysFileError(f"{where}: expected `name:key`")
    tenant = Tenant(name, tenant_salt(name))
    for option in options:
        tenant = replace(tenant, **_option(where, option, tiers))
    return key, tenant


def _option(where: str, option: str, tiers: Collection[str]) -> dict[str, Any]:
    """The field of Tenant that an option sets."""
    name, _, value = option.partition("=")
    if name == "most_urgent" and value in _PRIORITIES:
        return {name: int(value)}
    if name == "service_tier" and value in tiers:
        return {name: value}
    raise KeysFileError(
        f"{where}: after the key are allowed most_urgent=N with N from {-MAX_PRIORITY} to {-MIN_PRIORITY}, and"
        f" service_tier=NAME with NAME one of {', '.join(tiers)}"
    )
