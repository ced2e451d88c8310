"""Who is asking: API keys, and what keeps one tenant's cached blocks from another."""

import hashlib
import hmac
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from perigee.kvstore.blocks import NO_SALT
from perigee.server.errors import Unauthorized


class KeysFileError(Exception):
    """Raised when the file of API keys cannot be read or says nothing."""


@dataclass(frozen=True, slots=True)
class Tenant:
    """Whoever sent a request. `salt` goes into the keys of all its blocks, so no other tenant can hit them."""

    name: str
    salt: bytes


ANONYMOUS = Tenant("anonymous", NO_SALT)


class Tenants:
    """All that may ask. With no keys at all, anybody may, and everybody shares the cache."""

    def __init__(self, keys: Mapping[str, str]) -> None:
        """`keys` names the tenant of each API key; several keys may belong to one tenant."""
        # Kept by digest: a lookup then takes a time that says nothing about how much of a guessed key was right.
        self._tenants = {_digest(key): Tenant(name, tenant_salt(name)) for key, name in keys.items()}

    @classmethod
    def load(cls, path: Path | None) -> "Tenants":
        """Reads `name:key` lines; empty lines and those that begin with # count for nothing. Raises KeysFileError."""
        if path is None:
            return cls({})
        try:
            lines = path.read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise KeysFileError(f"api_keys_file: {str(path)!r} cannot be read: {error}") from error
        keys = dict(_entry(path, number, line) for number, line in enumerate(lines, 1) if _says_something(line))
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


def _entry(path: Path, number: int, line: str) -> tuple[str, str]:
    """(key, name) of a line. The error does not quote the line: it may hold a secret."""
    name, colon, key = (part.strip() for part in line.partition(":"))
    if not (name and colon and key):
        raise KeysFileError(f"api_keys_file: {str(path)!r}, line {number}: expected `name:key`")
    return key, name
