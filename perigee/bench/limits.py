"""The fastest that a machine could run a model, were it busy with nothing but what the model needs."""

from perigee.bench.machine import MachineRates
from perigee.bench.workload import DECODE_PROMPT_TOKENS, DecodeTime, Figures, Sizes, decode_tokens
from perigee.kvstore.blocks import DTYPE_BYTES, DType
from perigee.workers.model.config import ModelConfig

# So many streams that a step reads every expert.
ALL_EXPERTS = 1 << 20


def limits(model: ModelConfig, rates: MachineRates, dtype: DType, sizes: Sizes) -> Figures:
    """Tokens a second. A prompt takes its operations at the measured rate of a large product; a decode step see
    `step_s`."""
    return Figures.of_times(
        {n: _prompt_s(model, rates, n) for n in sizes.prefill},
        {n: _decode_time(model, rates, dtype, n) for n in sizes.decode},
    )


def step_s(model: ModelConfig, rates: MachineRates, dtype: DType, streams: int) -> float:
    """A decode step reads the weights that somebody needs, once, and all KVCache, at the measured bandwidth, but is no
    faster than its operations are at the measured rate."""
    context = DECODE_PROMPT_TOKENS + decode_tokens(streams) // 2  # of a stream, on average
    kv_bytes = streams * context * model.payload_layout(dtype, block_tokens=1).tensor_bytes
    weight_bytes = model.step_weights(streams) * DTYPE_BYTES[dtype]
    memory_s = (weight_bytes + kv_bytes) / rates.memory_bytes_per_s
    return max(memory_s, streams * model.decode_flops(context) / rates.matmul_flops_per_s)


def weight_bytes(model: ModelConfig, dtype: DType) -> int:
    """Bytes of all weights that steps read."""
    return int(model.step_weights(ALL_EXPERTS) * DTYPE_BYTES[dtype])


def _prompt_s(model: ModelConfig, rates: MachineRates, num_tokens: int) -> float:
    return model.prefill_flops(num_tokens) / rates.matmul_flops_per_s


def _decode_time(model: ModelConfig, rates: MachineRates, dtype: DType, streams: int) -> DecodeTime:
    steps = decode_tokens(streams) - 1
    prompts_s = streams * _prompt_s(model, rates, DECODE_PROMPT_TOKENS)
    return DecodeTime(prompts_s, steps * step_s(model, rates, dtype, streams), streams * steps)
