"""A cost profile without a measurement: each part of the work at the rate of what bounds it.

Where the linear form adds two times of which a real machine pays mostly the longer, it errs upwards: a chunk of a few
hundred tokens is charged for reading the weights and for its products, which is about what the lower efficiency of
such narrow products comes to.
"""

from perigee.scheduler.cost import CostProfile
from perigee.scheduler.cost.hardware import Hardware
from perigee.scheduler.cost.model_shape import ModelShape

# Decode batches up to which the line through the roofline's two ends is drawn.
_LARGE_BATCH = 256

# Of the devices' memory; the rest is for activations and the runtime.
_USABLE_MEMORY = 0.9


def roofline(shape: ModelShape, hardware: Hardware) -> CostProfile:
    """The profile of a worker that runs a model of this shape on this hardware."""
    overhead_s = hardware.step_overhead_s + 2 * shape.num_layers * _allreduce_latency_s(hardware)
    always_read_s = _read_s(hardware, (shape.shared_weights + shape.head_weights) * shape.weight_bytes)
    experts_s = _read_s(hardware, shape.expert_weights * shape.weight_bytes)
    exchange_s = _exchange_s(shape, hardware)
    return CostProfile(
        prefill_fixed_s=overhead_s + always_read_s + experts_s,
        prefill_token_s=_product_s(hardware, shape.active_weights) + exchange_s,
        prefill_pair_s=_attention_s(hardware, shape.pair_flops),
        load_token_s=shape.kv_bytes_per_token / (_kv_shards(shape, hardware) * hardware.host_bytes_per_s),
        promote_token_s=shape.kv_bytes_per_token / hardware.ssd_bytes_per_s,
        transfer_fixed_s=hardware.network_latency_s,
        transfer_token_s=shape.kv_bytes_per_token / hardware.network_bytes_per_s,
        step_fixed_s=overhead_s + always_read_s,
        step_sequence_s=_beyond_reading_s(shape, hardware, always_read_s + experts_s) + exchange_s,
        step_context_token_s=_context_token_s(shape, hardware),
        step_experts_s=experts_s,
        step_expert_share=shape.expert_share,
    )


def kv_capacity_tokens(shape: ModelShape, hardware: Hardware) -> int:
    """Tokens whose KVCache fits beside the weights; 0 where the weights do not fit."""
    free_bytes = _USABLE_MEMORY * hardware.devices * hardware.memory_bytes - shape.total_bytes
    copies = hardware.devices / _kv_shards(shape, hardware)
    return max(0, int(free_bytes / (copies * shape.kv_bytes_per_token)))


def _product_s(hardware: Hardware, weights: float) -> float:
    """A product and a sum for each of these weights, as a part of large matrix products."""
    return 2 * weights / (hardware.devices * hardware.flops_per_s * hardware.compute_efficiency)


def _attention_s(hardware: Hardware, flops: float) -> float:
    return flops / (hardware.devices * hardware.flops_per_s * hardware.attention_efficiency)


def _read_s(hardware: Hardware, num_bytes: float) -> float:
    """Bytes that are spread over all devices."""
    return num_bytes / (hardware.devices * hardware.memory_bytes_per_s * hardware.memory_efficiency)


def _beyond_reading_s(shape: ModelShape, hardware: Hardware, weights_s: float) -> float:
    """What each sequence of a decode batch adds. Up to some batch a step is over when its weights are read, then its
    products bound it: this is the slope of the line from there to a large batch."""
    product_s = _product_s(hardware, shape.active_weights + shape.head_weights)
    return max(0.0, _LARGE_BATCH * product_s - weights_s) / (_LARGE_BATCH - 1)


def _context_token_s(shape: ModelShape, hardware: Hardware) -> float:
    """Reading a token's KVCache, or attending to it, whichever takes longer."""
    share = hardware.devices / _kv_shards(shape, hardware)
    return max(_read_s(hardware, share * shape.kv_bytes_per_token), _attention_s(hardware, shape.context_flops))


def _kv_shards(shape: ModelShape, hardware: Hardware) -> int:
    """Devices among which a token's KVCache is split. A latent is for all heads, so each device has all of it."""
    return min(hardware.devices, shape.kv_heads)


def _allreduce_latency_s(hardware: Hardware) -> float:
    return hardware.allreduce_latency_s if hardware.devices > 1 else 0.0


def _exchange_s(shape: ModelShape, hardware: Hardware) -> float:
    """A token's activations in the two all-reduces of each layer; a ring sends each byte nearly twice."""
    num_bytes = 2 * shape.num_layers * shape.hidden_size * shape.weight_bytes
    return 2 * (hardware.devices - 1) / hardware.devices * num_bytes / hardware.allreduce_bytes_per_s
