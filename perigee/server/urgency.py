"""How urgent a request is: what it asks for, within what its API key allows."""

from dataclasses import dataclass

from perigee.scheduler.slo import Slo
from perigee.server.config import ServerConfig
from perigee.server.errors import InvalidRequest
from perigee.server.tenants import Tenant

# OpenAI's names for leaving it to the server.
_UNSAID = ("auto", "default")


@dataclass(frozen=True, slots=True)
class Urgency:
    """As the Conductor takes it: the request of the highest `priority` goes first."""

    priority: int
    slo: Slo


def urgency_of(tenant: Tenant, priority: int | None, service_tier: str | None, config: ServerConfig) -> Urgency:
    """From the fields of a request: `priority`, of which the lowest goes first, as vLLM has it, and `service_tier`, the
    name of an SLO class. Raises InvalidRequest for what is not there or more than the tenant's key allows.
    """
    return Urgency(-_priority(tenant, priority), _slo(tenant, service_tier, config))


def _priority(tenant: Tenant, asked: int | None) -> int:
    if asked is None:
        return max(0, tenant.most_urgent)
    if asked < tenant.most_urgent:
        text = f"priority: {asked} is more urgent than this API key allows; allowed are {tenant.most_urgent} and more"
        raise InvalidRequest(text, param="priority")
    return asked


def _slo(tenant: Tenant, asked: str | None, config: ServerConfig) -> Slo:
    slos = config.slos
    if asked is None or asked in _UNSAID:
        return slos[tenant.service_tier or config.default_slo_class]
    if asked not in slos:
        allowed = ", ".join((*_UNSAID, *slos))
        raise InvalidRequest(f"service_tier: {asked!r} is not offered; allowed are {allowed}", param="service_tier")
    return slos[asked]
