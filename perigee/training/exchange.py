"""How processes that train together pass tensors on, and how many bytes that takes."""

from collections import Counter
from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor


class Exchange:
    """The processes of a torch.distributed group, by default all. `sent_bytes` of this process, by purpose, is filled
    here: what really goes to others, which is the least that each of the collectives can do with.
    """

    def __init__(self, group: dist.ProcessGroup | None = None) -> None:
        self.group = group
        self.rank = dist.get_rank(group)
        self.num_ranks = dist.get_world_size(group)
        self.sent_bytes: Counter[str] = Counter()

    def all_to_all(self, purpose: str, outgoing: Sequence[Tensor], incoming: Sequence[int]) -> list[Tensor]:
        """Sends each process its own of `outgoing`, flat and of one dtype, and receives `incoming` elements from each.

        Collective: all call it in the same order.
        """
        # As bytes: not every backend knows every dtype.
        dtype, width = outgoing[0].dtype, outgoing[0].itemsize
        sent = torch.cat(list(outgoing)).view(torch.uint8)
        out_splits = [part.nbytes for part in outgoing]
        in_splits = [count * width for count in incoming]
        received = sent.new_empty(sum(in_splits))
        dist.all_to_all_single(received, sent, in_splits, out_splits, group=self.group)
        self.sent_bytes[purpose] += sum(out_splits) - out_splits[self.rank]
        return list(torch.split(received.view(dtype), list(incoming)))
