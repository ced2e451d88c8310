"""What a worker's hardware can do: the half of a roofline that the machine says."""

from collections.abc import Mapping
from dataclasses import dataclass, replace


@dataclass(frozen=True, slots=True)
class Hardware:
    """One worker: `devices` of a kind that split each layer between them (tensor parallelism). Rates are of one device.

    Peaks are the vendor's, efficiencies what good kernels reach of them: `compute_efficiency` in large matrix products,
    `attention_efficiency` in attention, `memory_efficiency` in reading weights and KVCache.

    An all-reduce (two a layer) takes `allreduce_latency_s`, and its payload moves at `allreduce_bytes_per_s`, the bus
    bandwidth of a ring. `step_overhead_s` is what a step costs beside that: scheduling, launches, sampling.
    `host_bytes_per_s` is from the store's memory into the device's, `ssd_bytes_per_s` from its SSDs into its memory,
    `network_bytes_per_s` from another store node.
    """

    devices: int
    flops_per_s: float
    memory_bytes_per_s: float
    memory_bytes: int
    compute_efficiency: float
    attention_efficiency: float
    memory_efficiency: float
    allreduce_bytes_per_s: float
    allreduce_latency_s: float
    step_overhead_s: float
    host_bytes_per_s: float
    ssd_bytes_per_s: float
    network_bytes_per_s: float
    network_latency_s: float

    def with_devices(self, devices: int) -> "Hardware":
        """The same, with another degree of tensor parallelism."""
        return replace(self, devices=devices)


def cpu(threads: int, flops_per_s: float = 150e9, memory_bytes_per_s: float = 8e9) -> Hardware:
    """A worker on so many threads of a server's CPU; rates are a thread's, as recent ones have them in bfloat16 with
    their neighbours at work. Rough: meant to start from, where nothing was measured.
    """
    return Hardware(
        devices=1,
        flops_per_s=threads * flops_per_s,
        memory_bytes_per_s=threads * memory_bytes_per_s,
        memory_bytes=8 << 30,
        compute_efficiency=1.0,
        attention_efficiency=0.2,  # bound by exponentials there
        memory_efficiency=1.0,
        allreduce_bytes_per_s=1e9,  # of no account: one device has nobody to exchange anything with
        allreduce_latency_s=0.0,
        step_overhead_s=2e-3,
        host_bytes_per_s=4e9,
        ssd_bytes_per_s=1e9,
        network_bytes_per_s=1e9,
        network_latency_s=2e-3,
    )


# Eight GPUs of a server, as in the Mooncake paper's testbed (FAST '25, section 5.1), with up to 800 Gbps of RDMA.
#
# Peaks: NVIDIA's data sheets (dense bfloat16; the export versions differ in NVLink alone: 400 GB/s in both directions
# together, not 600 and 900). Efficiencies are customary figures, not fitted to any result of the paper: dense products
# reach 65-70% of the A100's peak and 60-65% of the H100's, which clocks down under such a load; FlashAttention forward
# about half of either; streaming reads 80-85%; a ring all-reduce 75-80% of one direction of NVLink. With them,
# LLaMA3-70B uses 47% of eight A800s' peak in a prompt of 8192 tokens, all-reduces included.
A800_80G = Hardware(
    devices=8,
    flops_per_s=312e12,
    memory_bytes_per_s=2.039e12,
    memory_bytes=80 * 10**9,
    compute_efficiency=0.65,
    attention_efficiency=0.5,
    memory_efficiency=0.8,
    allreduce_bytes_per_s=155e9,
    allreduce_latency_s=15e-6,
    step_overhead_s=5e-3,
    host_bytes_per_s=20e9,  # PCIe 4.0 x16
    ssd_bytes_per_s=6e9,
    network_bytes_per_s=80e9,  # 8 x 100 Gbps, of which a bulk transfer gets four fifths
    network_latency_s=1e-3,
)
H800_80G = replace(
    A800_80G,
    flops_per_s=989e12,
    memory_bytes_per_s=3.35e12,
    compute_efficiency=0.6,
    allreduce_latency_s=12e-6,
    step_overhead_s=4e-3,
    host_bytes_per_s=40e9,  # PCIe 5.0 x16
)
H100_80G = replace(H800_80G, allreduce_bytes_per_s=350e9)
HARDWARE: Mapping[str, Hardware] = {"A800-80G": A800_80G, "H800-80G": H800_80G, "H100-80G": H100_80G}
