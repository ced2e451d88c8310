"""A store node as the Conductor knows it."""

from dataclasses import dataclass

from perigee.scheduler.events import BlockEvents


@dataclass(slots=True)
class StoreView:
    """A store node whose blocks are known up to `next_seq`. While `resyncing`, its events are of no use.

    It can hold `num_slots` blocks, 0 while that is not known.
    """

    incarnation: str
    next_seq: int
    num_slots: int
    resyncing: bool = False

    def continues_with(self, events: BlockEvents) -> bool:
        """Whether these are the events that come next."""
        return not self.resyncing and self.incarnation == events.incarnation and self.next_seq == events.first_seq
