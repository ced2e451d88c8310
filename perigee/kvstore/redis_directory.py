"""The directory of a cluster, in Redis: a member is in it for as long as it renews its lease.

Two keys hold everything: a hash of the members by id, and a sorted set of when their leases end, on Redis's clock
alone. Each step is one script, so nobody sees half of it. Changes are published; watchers also look every now and then,
for messages get lost and leases end without one. When Redis is away everybody keeps the membership it has, and when it
is back, perhaps without its memory, members announce themselves again.
"""

import asyncio
import json
import logging
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import asdict, dataclass, fields
from typing import Any, Final
from urllib.parse import parse_qsl, urlencode, urlsplit, urlunsplit

from redis.asyncio import Redis
from redis.asyncio.client import PubSub
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import RedisError

from perigee.kvstore.members import Member
from perigee.kvstore.membership import Membership

_log = logging.getLogger(__name__)

DEFAULT_PREFIX: Final = "perigee"
DEFAULT_TTL_S: Final = 5.0
_RENEWALS_PER_TTL = 3  # so that one may get lost
_LAST_BACKOFF_S = 1.0

# Both keys go, too, when nobody has renewed anything for this many leases.
_KEYS_OUTLIVE_TTL = 10

# KEYS: members, leases. ARGV: id, incarnation, JSON, ttl in ms, channel, ms until the keys go, "1" to take the place of
# a former self. Says whether the member is in the directory now.
_RENEW = """
local known = redis.call('HGET', KEYS[1], ARGV[1])
if known and ARGV[7] ~= '1' and cjson.decode(known).incarnation ~= ARGV[2] then return 0 end
local time = redis.call('TIME')
redis.call('HSET', KEYS[1], ARGV[1], ARGV[3])
redis.call('ZADD', KEYS[2], time[1] * 1000 + math.floor(time[2] / 1000) + ARGV[4], ARGV[1])
redis.call('PEXPIRE', KEYS[1], ARGV[6])
redis.call('PEXPIRE', KEYS[2], ARGV[6])
if known ~= ARGV[3] then redis.call('PUBLISH', ARGV[5], ARGV[1]) end
return 1
"""

# KEYS: members, leases. ARGV: id, incarnation, channel.
_LEAVE = """
local known = redis.call('HGET', KEYS[1], ARGV[1])
if not known or cjson.decode(known).incarnation ~= ARGV[2] then return 0 end
redis.call('HDEL', KEYS[1], ARGV[1])
redis.call('ZREM', KEYS[2], ARGV[1])
redis.call('PUBLISH', ARGV[3], ARGV[1])
return 1
"""

# KEYS: members, leases. Removes whose leases have ended, and returns the JSON of all others.
_LIST = """
local time = redis.call('TIME')
local now = time[1] * 1000 + math.floor(time[2] / 1000)
for _, id in ipairs(redis.call('ZRANGEBYSCORE', KEYS[2], '-inf', now)) do
  redis.call('HDEL', KEYS[1], id)
  redis.call('ZREM', KEYS[2], id)
end
return redis.call('HVALS', KEYS[1])
"""


@dataclass(frozen=True, slots=True)
class _Place:
    """Where in which Redis a directory is: its URL, without what only we understand."""

    url: str
    prefix: str
    ttl_s: float

    @classmethod
    def parse(cls, target: str) -> "_Place":
        parts = urlsplit(target)
        query = dict(parse_qsl(parts.query))
        prefix, ttl_s = query.pop("prefix", DEFAULT_PREFIX), float(query.pop("ttl_s", DEFAULT_TTL_S))
        return cls(urlunsplit(parts._replace(query=urlencode(query))), prefix, ttl_s)

    @property
    def keys(self) -> list[str]:
        # In braces, so that a Redis Cluster keeps them together.
        return [f"{{{self.prefix}}}:members", f"{{{self.prefix}}}:leases"]

    @property
    def channel(self) -> str:
        return f"{{{self.prefix}}}:changes"

    @property
    def label(self) -> str:
        """For the log."""
        return f"{urlsplit(self.url).hostname}/{self.prefix}"

    @asynccontextmanager
    async def connected(self, password: str) -> AsyncIterator["Redis"]:
        """A client that gives up at the first failure: how long to wait is for its user to say."""
        client = Redis.from_url(
            self.url,
            password=password or None,
            decode_responses=True,
            retry=Retry(NoBackoff(), 0),
            socket_timeout=self.renewal_s,
            socket_connect_timeout=self.renewal_s,
        )
        async with client:
            yield client

    @property
    def renewal_s(self) -> float:
        """How often leases are renewed, and looked through; also how long an answer may take."""
        return self.ttl_s / _RENEWALS_PER_TTL


async def stay_joined(target: str, member: Member, password: str) -> None:
    """Keeps `member` in the directory at `target` until cancelled, through restarts of Redis, and then takes it out.

    One that is replaced by a later process of its id stays out for as long as that one is in.
    """
    place = _Place.parse(target)
    lease = _Lease(place, member)
    async with place.connected(password) as client:
        try:
            while True:
                wait_s = await lease.renewed(client)
                _heed_cancellation()
                await asyncio.sleep(wait_s)
        finally:
            await lease.end(client)


async def watch(target: str, password: str) -> AsyncGenerator[tuple[Member, ...], None]:
    """The members in the directory at `target`, and again after each change, through restarts of Redis.

    While Redis is away nothing comes; for two leases after it is back nobody is taken to have left.
    """
    place = _Place.parse(target)
    loop = asyncio.get_running_loop()
    membership = Membership(2 * place.ttl_s)
    last: tuple[Member, ...] | None = None
    backoff_s = place.ttl_s / 100
    while True:
        try:
            async with place.connected(password) as client, client.pubsub() as changes:
                await changes.subscribe(place.channel)
                while True:
                    members = membership.seen(await _listed(client, place), loop.time())
                    _heed_cancellation()
                    backoff_s = place.ttl_s / 100
                    if members != last:
                        last = members
                        yield members
                    await _change(changes, place)
        except (RedisError, OSError) as error:
            _log.warning("cannot watch directory=%s error=%s", place.label, error)
            membership.lost_sight()
            _heed_cancellation()
        await asyncio.sleep(backoff_s)
        backoff_s = min(2 * backoff_s, place.renewal_s, _LAST_BACKOFF_S)


class _Lease:
    """One member's place in the directory."""

    def __init__(self, place: _Place, member: Member) -> None:
        self._place = place
        self._member = member
        self._announced = False  # to some Redis, once: what has taken our place since is our successor
        self._joined = False

    async def renewed(self, client: Redis) -> float:
        """Renews the lease if that can be done. Returns in how many seconds to do it again."""
        try:
            joined = await self._renew(client)
        except (RedisError, OSError) as error:
            self._log_change(False, str(error))
            return min(self._place.renewal_s, _LAST_BACKOFF_S)
        self._announced = True
        self._log_change(joined, "another process has taken its place")
        return self._place.renewal_s

    async def end(self, client: Redis) -> None:
        """Takes the member out, unless its place is another's by now. If Redis is away the lease ends by itself."""
        member, place = self._member, self._place
        try:
            await _call(client, _LEAVE, place, member.id, member.incarnation, place.channel)
            _log.info("left directory=%s id=%s", place.label, member.id)
        except (RedisError, OSError) as error:
            _log.warning("could not leave directory=%s id=%s error=%s", place.label, member.id, error)

    async def _renew(self, client: Redis) -> bool:
        member, place = self._member, self._place
        ttl_ms = round(place.ttl_s * 1000)
        first = "0" if self._announced else "1"
        arguments = (json.dumps(asdict(member)), ttl_ms, place.channel, _KEYS_OUTLIVE_TTL * ttl_ms, first)
        return bool(await _call(client, _RENEW, place, member.id, member.incarnation, *arguments))

    def _log_change(self, joined: bool, reason: str) -> None:
        if joined and not self._joined:
            _log.info("joined directory=%s id=%s", self._place.label, self._member.id)
        elif not joined and (self._joined or not self._announced):
            _log.warning("not in directory=%s id=%s error=%s", self._place.label, self._member.id, reason)
        self._joined = joined


def _heed_cancellation() -> None:
    """Redis's client loses a cancellation that comes while it connects to subscribe; the task still knows of it."""
    task = asyncio.current_task()
    if task and task.cancelling():
        raise asyncio.CancelledError


async def _listed(client: Redis, place: _Place) -> list[Member]:
    return [member for text in await _call(client, _LIST, place) if (member := _member(text))]


async def _change(changes: PubSub, place: _Place) -> None:
    """Returns at the next change, or when it is time to look whose leases have ended."""
    await changes.get_message(ignore_subscribe_messages=True, timeout=place.renewal_s)


async def _call(client: Redis, script: str, place: _Place, *arguments: str | int) -> Any:
    return await client.register_script(script)(keys=place.keys, args=arguments)


def _member(text: str) -> Member | None:
    """What a member said of itself. Other versions of us may say more; one that says less is none."""
    try:
        said = json.loads(text)
        return Member(**{field.name: said[field.name] for field in fields(Member) if field.name in said})
    except (ValueError, TypeError) as error:
        _log.warning("unreadable member ignored text=%r error=%s", text, error)
        return None
