"""The one-way import rule, and what the pure modules may not reach."""

import subprocess
import sys
from pathlib import Path

import pytest

from tests.import_graph import ImportGraph

ROOT = Path(__file__).parents[1]

# Which layers a layer may import, besides itself. Other modules right under `perigee` (the command line and what starts
# a whole cluster) are on top: they may import everything, and no layer may import them.
TOP = "(top)"
LAYERS = {
    "configuration": set(),
    "output": {"configuration"},
    "plots": set(),
    "kvstore": set(),
    "workers": {"kvstore"},
    "scheduler": {"kvstore", "workers"},
    "server": {"kvstore", "workers", "scheduler"},
    "replay": {"output", "plots", "kvstore", "workers", "scheduler"},
    "profiling": {"output", "kvstore", "workers", "scheduler"},
    "training": {"output", "plots", "workers.model", "workers.attention"},
    "bench": {"output", "plots", "kvstore", "workers", "scheduler", "server", "replay", "profiling", "training"},
}

PURE = [
    "perigee.kvstore.blocks",
    "perigee.kvstore.evict",
    "perigee.kvstore.evict.base",
    "perigee.kvstore.evict.density",
    "perigee.kvstore.evict.lru",
    "perigee.kvstore.evict.ranked",
    "perigee.kvstore.evict.returns",
    "perigee.kvstore.evict.s3fifo",
    "perigee.kvstore.framing",
    "perigee.kvstore.holdings",
    "perigee.kvstore.index",
    "perigee.kvstore.jobs",
    "perigee.kvstore.limits",
    "perigee.kvstore.members",
    "perigee.kvstore.membership",
    "perigee.kvstore.messages",
    "perigee.kvstore.moves",
    "perigee.kvstore.pin_counts",
    "perigee.kvstore.pins",
    "perigee.kvstore.records",
    "perigee.kvstore.ssd_index",
    "perigee.kvstore.ssd_tier",
    "perigee.kvstore.store",
    "perigee.kvstore.tiers",
    "perigee.kvstore.transfer.base",
    "perigee.kvstore.transfer.frames",
    "perigee.kvstore.waiting",
    "perigee.plots.page",
    "perigee.plots.svg",
    "perigee.replay.curves",
    "perigee.replay.documents",
    "perigee.replay.keys",
    "perigee.replay.metrics",
    "perigee.replay.page",
    "perigee.replay.relive",
    "perigee.replay.series",
    "perigee.replay.shadow_report",
    "perigee.replay.simulator.clock",
    "perigee.replay.simulator.cluster",
    "perigee.replay.simulator.control",
    "perigee.replay.simulator.disk",
    "perigee.replay.simulator.engine",
    "perigee.replay.simulator.front",
    "perigee.replay.simulator.legs",
    "perigee.replay.simulator.machine",
    "perigee.replay.simulator.network",
    "perigee.replay.simulator.node",
    "perigee.replay.simulator.sampler",
    "perigee.replay.simulator.simulation",
    "perigee.replay.simulator.timing",
    "perigee.replay.simulator.worker",
    "perigee.replay.trace",
    "perigee.scheduler.admission.base",
    "perigee.scheduler.admission.foresight",
    "perigee.scheduler.admission.headroom",
    "perigee.scheduler.admission.margin",
    "perigee.scheduler.admission.open",
    "perigee.scheduler.admission.retry",
    "perigee.scheduler.admission.staged",
    "perigee.scheduler.balance.base",
    "perigee.scheduler.balance.copies",
    "perigee.scheduler.balance.donor",
    "perigee.scheduler.balance.pressure",
    "perigee.scheduler.balance.roles",
    "perigee.scheduler.commands",
    "perigee.scheduler.conductor",
    "perigee.scheduler.copy_log",
    "perigee.scheduler.cost",
    "perigee.scheduler.cost.accuracy",
    "perigee.scheduler.cost.corrections",
    "perigee.scheduler.cost.fit",
    "perigee.scheduler.cost.hardware",
    "perigee.scheduler.cost.model",
    "perigee.scheduler.cost.model_shape",
    "perigee.scheduler.cost.roofline",
    "perigee.scheduler.events",
    "perigee.scheduler.fairness",
    "perigee.scheduler.fleet",
    "perigee.scheduler.forecast",
    "perigee.scheduler.hot_prefixes",
    "perigee.scheduler.ids",
    "perigee.scheduler.lengths",
    "perigee.scheduler.limits",
    "perigee.scheduler.move_counts",
    "perigee.scheduler.outlook",
    "perigee.scheduler.placement.algorithm1",
    "perigee.scheduler.placement.base",
    "perigee.scheduler.placement.blind",
    "perigee.scheduler.placement.candidates",
    "perigee.scheduler.placement.fetching",
    "perigee.scheduler.placement.prefill",
    "perigee.scheduler.plan",
    "perigee.scheduler.policies",
    "perigee.scheduler.pools",
    "perigee.scheduler.prefixes",
    "perigee.scheduler.prompt_queue",
    "perigee.scheduler.receipt_json",
    "perigee.scheduler.receipts",
    "perigee.scheduler.recording.eventlog",
    "perigee.scheduler.recording.fields",
    "perigee.scheduler.recording.keybook",
    "perigee.scheduler.roster",
    "perigee.scheduler.shadow",
    "perigee.scheduler.slo",
    "perigee.scheduler.store_view",
    "perigee.scheduler.transfers",
    "perigee.scheduler.view",
    "perigee.scheduler.worker_view",
    "perigee.workers.engine.batcher",
    "perigee.workers.engine.pages",
    "perigee.workers.engine.sequence",
    "perigee.workers.messages",
]
IMPURE = {"asyncio", "torch", "grpc", "redis", "time", "random"}
# The standard library's own modules may use a clock or randomness inside; these four nothing pure may load at all.
NEVER_LOADED = ["asyncio", "torch", "grpc", "redis"]


@pytest.fixture(scope="module")
def graph() -> ImportGraph:
    return ImportGraph.read(ROOT / "perigee")


def layer_of(module: str) -> str:
    """The layer's name: the part after `perigee`, if that is a package."""
    parts = module.split(".")
    if len(parts) > 1 and parts[1] in LAYERS:
        return parts[1]
    return TOP


def may_import(importer: str, imported: str) -> bool:
    layer = layer_of(importer)
    if layer in (TOP, layer_of(imported)):
        return True
    inside = imported.removeprefix("perigee.")
    return any(f"{inside}.".startswith(f"{allowed}.") for allowed in LAYERS[layer])


def layering_violations(graph: ImportGraph) -> list[str]:
    return [
        f"{importer} imports {imported}"
        for importer, all_imported in graph.internal.items()
        for imported in sorted(all_imported)
        if not may_import(importer, imported)
    ]


def impurities(graph: ImportGraph, pure: list[str]) -> list[str]:
    """Each forbidden import that a module of `pure` reaches, and where."""
    return [
        f"{module} reaches {name} through {reached}"
        for module in pure
        for reached in sorted(graph.reached_from(module))
        for name in sorted(graph.external.get(reached, frozenset()) & IMPURE)
    ]


def test_every_package_has_its_layer() -> None:
    folders = {path.relative_to(ROOT / "perigee").parts[0] for path in (ROOT / "perigee").glob("*/**/*.py")}
    assert folders - LAYERS.keys() == set()


def test_imports_go_one_way(graph: ImportGraph) -> None:
    assert layering_violations(graph) == []


def test_no_modules_import_each_other_not_even_inside_functions(graph: ImportGraph) -> None:
    assert graph.cycles() == []


def test_pure_modules_are_where_the_table_says(graph: ImportGraph) -> None:
    assert set(PURE) - graph.internal.keys() == set()


def test_pure_modules_reach_no_clock_chance_or_io(graph: ImportGraph) -> None:
    assert impurities(graph, PURE) == []


def test_importing_pure_modules_loads_no_io() -> None:
    script = f"""
import importlib, sys
for module in {PURE!r}:
    importlib.import_module(module)
    loaded = [name for name in {NEVER_LOADED!r} if name in sys.modules]
    if loaded:
        sys.exit(f"importing {{module}} loads {{loaded}}")
"""
    result = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=False)
    assert (result.returncode, result.stderr) == (0, "")


# The checks themselves, on packages that break the rules.


@pytest.fixture
def sample(tmp_path: Path) -> Path:
    """An empty package `perigee` with all layers."""
    package = tmp_path / "perigee"
    for layer in ("", *LAYERS, "workers/model", "workers/engine"):
        (package / layer).mkdir(parents=True, exist_ok=True)
        (package / layer / "__init__.py").touch()
    return package


def write(package: Path, **sources: str) -> ImportGraph:
    """The graph of `package` after adding `sources`, whose names have __ for a slash."""
    for name, source in sources.items():
        (package / f"{name.replace('__', '/')}.py").write_text(source)
    return ImportGraph.read(package)


@pytest.mark.parametrize(
    "source",
    [
        "import perigee.workers.engine",
        "import perigee.workers.engine as e",
        "from perigee import workers",
        "from perigee.workers import engine",
        "from ..workers.engine import anything",
        "from .. import workers",
        "from perigee.workers import *",
        "def f():\n    from perigee.workers import engine",
        "if TYPE_CHECKING:\n    import perigee.workers.engine",
        "import importlib\nimportlib.import_module('perigee.workers.engine')",
        "import perigee.up",
    ],
)
def test_an_import_upwards_is_found_in_any_form(sample: Path, source: str) -> None:
    (violation,) = layering_violations(write(sample, kvstore__bad=source, up=""))
    assert violation.startswith("perigee.kvstore.bad imports perigee.")


def test_imports_downwards_and_from_the_top_are_fine(sample: Path) -> None:
    graph = write(
        sample,
        cli="import perigee.server.a, perigee.replay.b, perigee.bench, perigee.up",
        up="from perigee.server import a",
        bench__a="import perigee.replay.b, perigee.server.a",
        server__a="from . import b\nfrom ..kvstore import x\nimport perigee.scheduler, torch",
        replay__b="import perigee.scheduler, perigee.workers.engine",
        training__a="from perigee.workers.model import x\nimport perigee.training",
    )
    assert layering_violations(graph) == []


def test_replay_and_server_stand_beside_each_other(sample: Path) -> None:
    graph = write(sample, replay__a="import perigee.server", server__a="import perigee.replay")
    assert layering_violations(graph) == [
        "perigee.replay.a imports perigee.server",
        "perigee.server.a imports perigee.replay",
    ]


def test_training_reaches_model_and_attention_only(sample: Path) -> None:
    graph = write(sample, training__a="import perigee.workers.model, perigee.workers.engine")
    assert layering_violations(graph) == ["perigee.training.a imports perigee.workers.engine"]


def test_a_cycle_hidden_in_a_function_is_found(sample: Path) -> None:
    graph = write(sample, kvstore__a="import perigee.kvstore.b", kvstore__b="def f():\n    from . import a")
    assert graph.cycles() == [["perigee.kvstore.a", "perigee.kvstore.b", "perigee.kvstore.a"]]


@pytest.mark.parametrize("source", ["import time", "from time import monotonic", "def f():\n    import time as t"])
def test_impurity_is_found_through_others(sample: Path, source: str) -> None:
    graph = write(sample, kvstore__a="from perigee.kvstore import b", kvstore__b="from .c import x", kvstore__c=source)
    assert impurities(graph, ["perigee.kvstore.a"]) == ["perigee.kvstore.a reaches time through perigee.kvstore.c"]


def test_impurity_is_found_in_the_packages_on_the_way(sample: Path) -> None:
    (sample / "workers" / "__init__.py").write_text("import torch.nn")
    graph = write(sample, workers__engine__a="x = 1")
    assert impurities(graph, ["perigee.workers.engine.a"]) == [
        "perigee.workers.engine.a reaches torch through perigee.workers"
    ]
