"""Distributed Muon ("Muon is Scalable for LLM Training", 2.3): each process keeps the state of its part of the weights.

One step of every process, as the paper's algorithm 1:

    reduce-scatter   the average of everybody's gradients, for this process's part
    momentum         of that part alone, by the state that is kept for it alone (ZeRO-1)
    gather           the rest of matrices that the cut between two parts goes through, in the iteration's dtype
    Newton–Schulz    of the matrices of which this process owns a part; of the result it keeps its part
    all-gather       the weights

AdamW's groups do the same without the gather.
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.optim.optimizer import ParamsT

from perigee.training.errors import TrainingError
from perigee.training.exchange import Exchange
from perigee.training.muon import Muon
from perigee.training.partition import Partition, Slice, fill_part, flat_part
from perigee.training.rules import adamw_update, apply_update, look_ahead, muon_updates

_BUFFERS = {"muon": ("momentum_buffer",), "adamw": ("exp_avg", "exp_avg_sq")}


@dataclass(slots=True)
class Shard:
    """A group's state for the part of its parameters that this process owns. The optimizer fills it."""

    partition: Partition
    own: Slice
    buffers: dict[str, Tensor]  # each [len(own)]
    step: int = 0


class DistributedMuon(Muon):
    """Muon whose state is partitioned among the processes of `process_group`, by default all.

    Parameters are whole in every process, contiguous, and equal from the start; each process brings the gradients of
    its own share of a batch, and one without a gradient counts as zeros. `step`, `state_dict` and
    `load_state_dict` are collective.
    """

    def __init__(self, params: ParamsT, *, process_group: dist.ProcessGroup | None = None, **options: Any) -> None:
        super().__init__(params, **options)
        self.exchange = Exchange(process_group)
        self.shards = [self._shard(group) for group in self.param_groups]

    @property
    def state_bytes(self) -> int:
        """What this process's state takes."""
        return sum(buffer.nbytes for shard in self.shards for buffer in shard.buffers.values())

    def _move(self, index: int, group: dict[str, Any]) -> None:
        shard = self.shards[index]
        shard.step += 1
        gradient = self._reduce_scatter(group["params"], shard.partition)
        update = self._muon_part if group["kind"] == "muon" else self._adamw_part
        weights = flat_part(group["params"], shard.partition.tensors, shard.own)
        apply_update(weights, update(gradient, shard, group), group["lr"], group["weight_decay"])
        self._all_gather(weights, group["params"], shard.partition)

    def state_dict(self) -> dict[str, Any]:
        """The same as Muon's of one process, whole in every process: to resume with any number of processes."""
        packed = super().state_dict()
        index = 0
        for group, shard in zip(self.param_groups, self.shards, strict=True):
            whole = {name: self._whole(buffer, shard.partition) for name, buffer in shard.buffers.items()}
            for place, shape in zip(shard.partition.tensors, shard.partition.shapes, strict=True):
                if shard.step:  # before the first there is no state
                    state = {name: place.of(flat).view(shape).clone() for name, flat in whole.items()}
                    step = {"step": torch.tensor(float(shard.step))} if group["kind"] == "adamw" else {}
                    packed["state"][index] = step | state
                index += 1
        return packed

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Takes this process's part of what `state_dict`, here or of Muon, returned.

        Raises TrainingError if only some parameters of a group have a state.
        """
        super().load_state_dict({**state_dict, "state": {}})
        first = 0
        for group, shard in zip(self.param_groups, self.shards, strict=True):
            indices = range(first, first + len(group["params"]))
            found = [state_dict["state"][index] for index in indices if index in state_dict["state"]]
            if found and len(found) < len(indices):
                raise TrainingError(
                    f"state_dict: holds {len(found)} of a group's {len(indices)}, allowed are all or none"
                )
            self._load(shard, found)
            first = indices.stop

    def _load(self, shard: Shard, states: list[dict[str, Tensor]]) -> None:
        if not states:  # of an optimizer that made no step yet
            return
        # Muon's rule does not depend on how many steps were before; that there were some is all that counts.
        shard.step = int(states[0].get("step", torch.ones(())))
        for name, buffer in shard.buffers.items():
            buffer.copy_(flat_part([state[name] for state in states], shard.partition.tensors, shard.own))

    def _shard(self, group: dict[str, Any]) -> Shard:
        partition = Partition(tuple(parameter.shape for parameter in group["params"]), self.exchange.num_ranks)
        own = partition.of_rank(self.exchange.rank)
        like = group["params"][0]
        return Shard(partition, own, {name: like.new_zeros(len(own)) for name in _BUFFERS[group["kind"]]})

    def _adamw_part(self, gradient: Tensor, shard: Shard, group: dict[str, Any]) -> Tensor:
        moments = shard.buffers["exp_avg"], shard.buffers["exp_avg_sq"]
        return adamw_update(gradient, moments, shard.step, group["betas"], group["eps"])

    def _muon_part(self, gradient: Tensor, shard: Shard, group: dict[str, Any]) -> Tensor:
        direction = look_ahead(gradient, shard.buffers["momentum_buffer"], group["momentum"])
        window, whole = self._gather(direction.to(self.dtype), shard)
        matrices = [
            place.of(whole, window.first).view(shape) for place, shape in shard.partition.matrices(self.exchange.rank)
        ]
        updates = [update.flatten() for update in muon_updates(matrices, self.dtype)]
        return shard.own.of(torch.cat([*updates, gradient.new_empty(0)]), window.first)

    def _gather(self, direction: Tensor, shard: Shard) -> tuple[Slice, Tensor]:
        """The matrices of which this process owns a part, whole and end to end, and where they lie."""
        window = shard.partition.windows[self.exchange.rank]
        wanted = [theirs.within(shard.own) for theirs in shard.partition.windows]
        outgoing = [part.of(direction, shard.own.first) for part in wanted]
        incoming = [len(window.within(theirs)) for theirs in shard.partition.ranks]
        return window, torch.cat(self.exchange.all_to_all("matrices", outgoing, incoming))

    def _reduce_scatter(self, parameters: list[Tensor], partition: Partition) -> Tensor:
        """The average of everybody's gradients for this process's part."""
        gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
        outgoing = [flat_part(gradients, partition.tensors, part) for part in partition.ranks]
        own = len(partition.of_rank(self.exchange.rank))
        received = self.exchange.all_to_all("gradients", outgoing, [own] * self.exchange.num_ranks)
        return torch.stack(received).sum(dim=0) / self.exchange.num_ranks

    def _all_gather(self, weights: Tensor, parameters: list[Tensor], partition: Partition) -> None:
        """Writes everybody's part of the weights to the parameters."""
        fill_part(parameters, partition.tensors, Slice(0, partition.total), self._whole(weights, partition, "weights"))

    def _whole(self, own: Tensor, partition: Partition, purpose: str = "state") -> Tensor:
        """Everybody's part, end to end."""
        lengths = [len(part) for part in partition.ranks]
        return torch.cat(self.exchange.all_to_all(purpose, [own] * self.exchange.num_ranks, lengths))
