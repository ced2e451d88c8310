"""Cluster files: what they may say, and what is wrong with others."""

from pathlib import Path

import pytest

from perigee.replay.errors import ClusterError
from perigee.replay.simulator.cluster import Cluster, changed, read_cluster
from perigee.replay.simulator.machine import machine_of, size_of
from perigee.replay.simulator.simulation import Simulation, simulate
from perigee.replay.trace import TraceRequest

EXAMPLES = Path(__file__).parents[3] / "deploy" / "clusters"

SMALL = """
name: small
model: LLaMA3-70B
hardware: A800-80G
nodes:
  - {roles: [prefill], count: 1, dram_gib: 100}
  - {roles: [decode], count: 1, capacity_tokens: 100000}
"""


def written(folder: Path, text: str) -> Path:
    path = folder / "cluster.yaml"
    path.write_text(text, encoding="utf-8")
    return path


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.yaml")), ids=lambda path: path.stem)
def test_every_example_serves_a_request(path: Path) -> None:
    request = TraceRequest(0.0, input_tokens=2000, output_tokens=5, prefix_ids=(0, 1, 2, 3), block_tokens=512)
    (record,) = simulate([request], read_cluster(path)).records
    assert record.ttft_s is not None and 0.01 < record.ttft_s < 2
    assert record.tbt_s is not None and 0.001 < record.tbt_s < 0.1


@pytest.mark.parametrize(
    ("before", "after", "complaint"),
    [
        ("count: 1, dram", "count: 0, dram", "nodes.0.count: 0: Input should be greater than or equal to 1"),
        ("count: 1, dram", "size: 3, count: 1, dram", "nodes.0.size: no such field"),
        ("name: small\n", "", "name: is missing"),
        ("dram_gib: 100}", "}", "nodes.0: dram_gib, capacity_tokens: allowed is exactly one of the two"),
        ("[decode]", "[prefill]", "nodes: there are only prefill workers, allowed are both or mixed ones"),
        ("[decode]", "[decoder]", "nodes.1.roles.0: 'decoder': Input should be 'prefill', 'decode' or 'mixed'"),
        ("LLaMA3-70B", "GPT", "model: is 'GPT', allowed are LLaMA3-70B, Moonlight-16B-A3B"),
        ("name: small", "name: small\nplacement: best", "placement: is 'best', allowed are perigee"),
        ("hardware: A800-80G", "", "model, hardware, profile: allowed are the first two or the third"),
        ("name: small", "name: small\nblock_tokens: 500", "block_tokens: is 500, allowed are powers of two"),
        ("[decode], count: 1", "[decode], count: 1, pipeline_stages: 2", "pipeline_stages: is 2, allowed is 1 unless"),
        ("name: small", "name: [", "while parsing"),
        (SMALL, "", "None: allowed are fields and their values"),
        (
            "{roles: [decode], count: 1, capacity_tokens: 100000}",
            "5",
            "nodes.1: 5: allowed are fields and their values",
        ),
        ("name: small", "name: small\nprefix_cache: none", "prefix_cache: is 'none', allowed only if all workers are"),
        (
            "name: small",
            "name: small\nprefix_cache: local",
            "placement: is 'perigee', allowed with prefix_cache local are local-cache, least-loaded",
        ),
        (
            "name: small",
            "name: small\nprefix_cache: local\nplacement: random\nbalance: copies",
            "balance: is 'copies', allowed with prefix_cache local are roles, none",
        ),
    ],
)
def test_what_is_wrong_is_named_with_what_is_allowed(before: str, after: str, complaint: str, tmp_path: Path) -> None:
    path = written(tmp_path, SMALL.replace(before, after))
    with pytest.raises(ClusterError) as caught:
        read_cluster(path)
    assert complaint in str(caught.value) and str(path) in str(caught.value)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ClusterError, match=r"nothing\.yaml: No such file"):
        read_cluster(tmp_path / "nothing.yaml")


def test_flags_change_what_the_file_says(tmp_path: Path) -> None:
    cluster = read_cluster(written(tmp_path, SMALL))
    assert changed(cluster, placement="random").placement == "random"
    with pytest.raises(ClusterError, match="admission: is 'all'"):
        changed(cluster, admission="all")


def test_a_model_that_does_not_fit_is_refused(tmp_path: Path) -> None:
    cluster = changed(read_cluster(written(tmp_path, SMALL)), devices=1)
    with pytest.raises(ClusterError, match="does not fit into 1 of A800-80G"):
        machine_of(cluster)


@pytest.mark.parametrize(
    ("size", "what"), [("kv_tokens: 511", "pages"), ("capacity_tokens: 511", "memory"), ("ssd_gib: 0.1", "SSD")]
)
def test_what_holds_no_block_is_refused(size: str, what: str, tmp_path: Path) -> None:
    text = SMALL.replace("capacity_tokens: 100000", size if what == "memory" else f"capacity_tokens: 100000, {size}")
    cluster = read_cluster(written(tmp_path, text))
    with pytest.raises(ClusterError, match=f"nodes: [0-9]+ tokens of {what} hold no block of 512"):
        Simulation(cluster)


def test_sizes_follow_from_model_and_hardware(tmp_path: Path) -> None:
    cluster = changed(read_cluster(written(tmp_path, SMALL)), nic_gbps=100)
    machine = machine_of(cluster)
    assert machine.kv_bytes == 320 * 1024  # 80 layers of 8 heads of 128 keys and values, in 2 bytes
    prefill, decode = (size_of(group, cluster, machine) for group in cluster.nodes)
    assert prefill.num_slots == (100 << 30) // machine.kv_bytes // 512
    assert decode.num_slots == 100_000 // 512
    assert prefill.nic_tokens_per_s == pytest.approx(100e9 / 8 / machine.kv_bytes)
    assert machine.profile.transfer_token_s == pytest.approx(1 / prefill.nic_tokens_per_s)


def test_a_profile_is_found_beside_the_file(tmp_path: Path) -> None:
    text = SMALL.replace("model: LLaMA3-70B\nhardware: A800-80G", "profile: p.yaml\nkv_bytes_per_token: 100")
    with pytest.raises(ClusterError, match=r"nodes\.0\.kv_tokens: is missing"):
        read_cluster(written(tmp_path, text))
    cluster = read_cluster(written(tmp_path, text.replace("count: 1", "count: 1, kv_tokens: 1000")))
    assert isinstance(cluster, Cluster) and cluster.profile == tmp_path / "p.yaml"
