"""The `perigee` command: where a configuration comes from, what is said of a wrong one, and how a command ends."""

import pkgutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any, Literal

import pytest
from pydantic import BaseModel, ByteSize, Field, SecretStr

from perigee.cli import COMMANDS
from perigee.configuration import ConfigurationError, FlagParser, add_flags, as_flags, load
from perigee.up import UpConfig, plan


class Example(BaseModel, frozen=True, extra="forbid"):
    """A field of each kind."""

    name: str = Field("one", description="a text")
    count: int | None = Field(None, ge=1, description="a number, 100% optional")
    kind: Literal["a", "b"] = Field("a", description="a choice")
    size: ByteSize = Field(ByteSize(1024), description="a size")
    path: Path = Field(Path("x"), description="a path")
    fast: bool = Field(False, description="a switch")
    many: tuple[int, ...] = Field((1, 2), description="several numbers")


def parsed(
    *arguments: str, environ: dict[str, str] | None = None, file: Path | None = None, positional: tuple[str, ...] = ()
) -> Example:
    parser = FlagParser("example", allow_abbrev=False)
    add_flags(parser, Example, positional)
    return load(
        Example,
        command="example",
        file=file,
        sections=["example", "other"],
        environ=environ or {},
        flags=vars(parser.parse_args(arguments)),
        positional=positional,
    )


def problems(*arguments: str, **sources: Any) -> tuple[str, ...]:
    with pytest.raises(ConfigurationError) as caught:
        parsed(*arguments, **sources)
    return caught.value.problems


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "settings.yaml"
    path.write_text("example: {name: file, count: 3, kind: b}\nother: {port: 1}\n")
    return path


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where no perigee.yaml of the developer's lies."""
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    return tmp_path / "work"


def test_defaults_hold_where_nothing_is_said() -> None:
    assert parsed() == Example()


def test_flags_beat_the_environment_which_beats_the_file(file: Path) -> None:
    environ = {"PERIGEE_EXAMPLE_NAME": "environment", "PERIGEE_EXAMPLE_COUNT": "2", "PERIGEE_OTHER_NAME": "not ours"}
    assert parsed("--name=flag", file=file, environ=environ) == Example(name="flag", count=2, kind="b")


def test_a_file_of_the_usual_name_is_read_where_there_is_one(elsewhere: Path) -> None:
    (elsewhere / "perigee.yaml").write_text("example: {name: usual}")
    assert parsed().name == "usual"


def test_every_kind_of_field_is_a_flag() -> None:
    said = parsed("--count=2", "--kind=b", "--size=2MiB", "--path=/y", "--fast", "--many=5,6")
    assert said == Example(count=2, kind="b", size=ByteSize(2 << 20), path=Path("/y"), fast=True, many=(5, 6))
    assert parsed("--no-fast").fast is False


def test_a_positional_field_is_an_argument() -> None:
    assert parsed("two", positional=("name",)).name == "two"


def test_the_flags_of_a_configuration_give_it_again() -> None:
    config = Example(name="with spaces", count=7, kind="b", size=ByteSize(77), path=Path("/a b"), fast=True, many=(3,))
    assert parsed(*as_flags(config)) == config
    assert parsed(*as_flags(Example())) == Example()
    assert parsed(*as_flags(Example(many=()))) == Example(many=())


@pytest.mark.parametrize(
    ("arguments", "environ", "said"),
    [
        (["--kind=c"], {}, "--kind: 'c': Input should be 'a' or 'b'"),
        (["--count=0"], {}, "--count: '0': Input should be greater than or equal to 1"),
        ([], {"PERIGEE_EXAMPLE_COUNT": "0"}, "PERIGEE_EXAMPLE_COUNT: '0': Input should be greater than or equal to 1"),
        (["--many=1,x"], {}, "--many: 'x': Input should be a valid integer, unable to parse string as an integer"),
        (["--cuont=1"], {}, "unrecognized arguments: --cuont=1; see example --help"),
        (["--count"], {}, "argument --count: expected one argument; see example --help"),
    ],
)
def test_a_problem_names_where_it_was_said_the_value_and_what_is_allowed(
    arguments: list[str], environ: dict[str, str], said: str
) -> None:
    assert problems(*arguments, environ=environ) == (said,)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("example: {count: x}", "example.count: 'x': Input should be a valid integer, unable to parse string"),
        ("example: {cuont: 1}", "example.cuont: no such field; allowed are name, count, kind, size, path, fast, many"),
        ("exmaple: {}", "exmaple: no such section; allowed are the sections example, other"),
        (
            "example: {many: {1: 2}}",
            "example.many: {1: 2}: allowed is a list, or a text with commas",
        ),
        ("example: 3", "example: holds a int, expected fields"),
        ("- 1", "holds a list; allowed are the sections example, other"),
        ("a: [", "while parsing a flow node"),
    ],
)
def test_a_problem_in_the_file_names_the_file_and_the_place(tmp_path: Path, content: str, said: str) -> None:
    path = tmp_path / "wrong.yaml"
    path.write_text(content)
    (problem,) = problems(file=path)
    assert str(path) in problem
    assert said in problem


def test_a_file_that_is_not_there_is_a_problem(tmp_path: Path) -> None:
    (problem,) = problems(file=tmp_path / "none.yaml")
    assert problem.startswith("--config: ")
    assert "No such file" in problem


def perigee(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "perigee", *arguments], capture_output=True, text=True, timeout=60)


def test_the_command_alone_lists_all_commands() -> None:
    said = perigee()
    assert (said.returncode, said.stderr) == (0, "")
    assert all(f"  {command.name} " in said.stdout for command in COMMANDS)


@pytest.mark.parametrize("arguments", [("bench",), ("bench", "--help")])
def test_bench_alone_lists_the_benchmarks(arguments: tuple[str, ...]) -> None:
    said = perigee(*arguments)
    assert (said.returncode, said.stderr) == (0, "")
    assert [f"  {command.name} " in said.stdout for command in COMMANDS] == [
        command.name.startswith("bench ") for command in COMMANDS
    ]


def test_up_refuses_block_sparse_attention_that_cannot_be_read_before_it_starts_anything() -> None:
    said = perigee("up", "--port=0", "--moba=block_size=512")
    assert (said.returncode, said.stdout) == (2, "")
    assert said.stderr == "perigee: --moba: 'block_size=512': top_k: None; allowed are integers from 1 on\n"


def test_the_help_tells_the_policies() -> None:
    said = " ".join(perigee("up", "--help").stdout.split())
    assert "workers of a request: perigee, global-cache, local-cache, least-loaded, round-robin, random." in said


def test_an_unknown_command_is_refused_with_what_there_is() -> None:
    said = perigee("serve", "--port=1")
    assert (said.returncode, said.stdout) == (2, "")
    assert said.stderr.startswith("perigee: 'serve --port=1': no such command; allowed are up, server,")


def test_what_is_needed_and_missing_is_said_line_by_line() -> None:
    said = perigee("store")
    assert said.returncode == 2
    assert [line.split(" is needed")[0] for line in said.stderr.splitlines()] == [
        "perigee: --socket:",
        "perigee: --directory:",
    ]


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: command.section)
def test_help_tells_every_field_of_every_command(command: Any) -> None:
    parser = FlagParser("perigee")
    config = pkgutil.resolve_name(command.config)
    add_flags(parser, config, command.positional)
    told = " ".join(parser.format_help().split())
    for field in config.model_fields.values():
        assert " ".join(field.description.split()) in told
    pkgutil.resolve_name(command.run)
    assert all(issubclass(pkgutil.resolve_name(error), Exception) for error in command.errors)


@pytest.mark.parametrize("command", ["server", "conductor", "store", "replay", "up"])
def test_only_workers_load_torch(command: str) -> None:
    (run,) = [each.run for each in COMMANDS if each.name == command]
    code = f"import pkgutil, sys; pkgutil.resolve_name({run!r}); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == 0


def test_a_service_that_is_told_to_stop_cleans_up_and_has_not_failed(tmp_path: Path) -> None:
    socket = tmp_path / "store.sock"
    flags = [f"--socket={socket}", f"--directory=unix:{tmp_path}/none.sock", "--dram-bytes=4194304"]
    with subprocess.Popen(
        [sys.executable, "-m", "perigee", "store", *flags], stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stderr is not None
        started = process.stderr.readline()
        assert " INFO [store-0] perigee.kvstore.node: node started " in started
        process.send_signal(signal.SIGTERM)
        assert "Traceback" not in process.stderr.read()
    assert process.returncode == 0
    assert list(tmp_path.glob("*.sock")) == []


def test_what_a_command_cannot_do_is_said_in_a_line(tmp_path: Path) -> None:
    said = perigee("replay", str(tmp_path / "none.jsonl"))
    assert (said.returncode, said.stdout) == (1, "")
    assert len(said.stderr.splitlines()) == 1
    assert said.stderr.startswith("perigee replay: ")


def test_up_tells_its_processes_what_it_was_told(tmp_path: Path) -> None:
    config = UpConfig(
        model="/models/my.gguf", prefill=2, decode=3, threads=5, max_context=512, shared_prompt_tokens=64,
        dtype="float32", tenant_weights=("gold=4", "free=0.5"),
    )  # fmt: skip
    specs = {spec.name: spec for spec in plan(config, 8123, Path("/cache/m"), tmp_path, ["--log-level=debug"])}
    assert list(specs) == [
        "conductor", "store-0", "prefill-0", "prefill-1", "decode-0", "decode-1", "decode-2", "server",
    ]  # fmt: skip
    decode = specs["decode-2"]
    assert decode.arguments[0] == "worker"
    told = {"--role=decode", "--threads=5", "--max-context=512", "--model=/cache/m", "--served-model-name=my"}
    assert told | {"--dtype=float32", "--log-level=debug"} <= set(decode.arguments)
    assert "--shared-prompt-tokens=64" in decode.arguments
    assert "--tenant-weights=gold=4,free=0.5" in specs["conductor"].arguments
    assert decode.environment["OMP_NUM_THREADS"] == "5"
    assert decode.environment["OMP_WAIT_POLICY"] == "passive"
    assert {"--port=8123", "--served-model-name=my"} <= set(specs["server"].arguments)


class Guarded(BaseModel, frozen=True, extra="forbid"):
    """A configuration with a secret."""

    cluster_secret: SecretStr | None = Field(None, description="a secret")


def guarded(environ: dict[str, str], file: Path | None = None) -> Guarded:
    return load(Guarded, command="example", file=file, sections=["example"], environ=environ, flags={})


def revealed(config: Guarded) -> str | None:
    return config.cluster_secret.get_secret_value() if config.cluster_secret else None


def test_a_secret_comes_from_the_environment_or_from_a_file_that_it_names(tmp_path: Path) -> None:
    path = tmp_path / "secret"
    path.write_text("of a file\n")
    assert revealed(guarded({})) is None
    assert revealed(guarded({"PERIGEE_CLUSTER_SECRET": "said"})) == "said"
    assert revealed(guarded({"PERIGEE_CLUSTER_SECRET_FILE": str(path)})) == "of a file"


def test_a_secret_said_twice_in_a_missing_file_or_in_the_settings_is_an_error(tmp_path: Path, file: Path) -> None:
    both = {"PERIGEE_CLUSTER_SECRET": "a", "PERIGEE_CLUSTER_SECRET_FILE": "b"}
    with pytest.raises(ConfigurationError, match="allowed is one of the two"):
        guarded(both)
    with pytest.raises(ConfigurationError, match=r"PERIGEE_CLUSTER_SECRET_FILE: .*No such file"):
        guarded({"PERIGEE_CLUSTER_SECRET_FILE": str(tmp_path / "none")})
    file.write_text("example: {cluster_secret: said}\n")
    with pytest.raises(ConfigurationError, match=r"example\.cluster_secret: is a secret; allowed is PERIGEE_CLUSTER"):
        guarded({}, file)


def test_a_secret_has_no_flag_but_the_help_tells_of_it() -> None:
    parser = FlagParser("example", allow_abbrev=False)
    add_flags(parser, Guarded)
    assert "PERIGEE_CLUSTER_SECRET or PERIGEE_CLUSTER_SECRET_FILE" in parser.format_help()
    with pytest.raises(ConfigurationError, match="--cluster-secret"):
        parser.parse_args(["--cluster-secret=x"])
    assert as_flags(guarded({"PERIGEE_CLUSTER_SECRET": "said"})) == []
