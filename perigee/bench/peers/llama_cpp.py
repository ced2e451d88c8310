"""llama.cpp, measured by its own `llama-batched-bench`, in the setting that suits it best at each size."""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path

from perigee.bench.peers.base import run_peer
from perigee.bench.peers.gguf_deepseek import FORMS, Form, write_gguf
from perigee.bench.workload import DECODE_PROMPT_TOKENS, DecodeTime, Figures, Job, best, decode_tokens
from perigee.workers.model.moonlight_config import MoonlightConfig

BENCH = "llama-batched-bench"


@dataclass(frozen=True, slots=True)
class Setting:
    """What llama.cpp leaves to its user: how attention is written down, flash attention, and tokens a pass."""

    form: Form
    flash_attention: bool
    ubatch: int

    @property
    def flags(self) -> list[str]:
        # `-b` is what one call may hold, `-ub` what one pass computes.
        flash = "on" if self.flash_attention else "off"
        return ["-fa", flash, "-b", str(max(2048, self.ubatch)), "-ub", str(self.ubatch)]


SETTINGS = tuple(Setting(form, flash, ubatch) for form, flash, ubatch in product(FORMS, (True, False), (512, 2048)))


class LlamaCpp:
    """llama.cpp's programs in `binaries`. The first round tries all settings, the others those that were best at some
    size. The checkpoint is converted once, into `directory`, which its owner removes."""

    name = "llama.cpp"

    def __init__(self, job: Job, model: MoonlightConfig, binaries: Path, directory: Path) -> None:
        self._job = job
        self._binary = binaries / BENCH
        self._files = {form: directory / f"{form}.gguf" for form in FORMS}
        for form, file in self._files.items():
            write_gguf(job.directory, model, file, form, job.dtype)
        self._settings: tuple[Setting, ...] = SETTINGS

    def measure(self) -> Figures:
        runs = {setting: self._measure(setting) for setting in self._settings}
        figures = best(list(runs.values()))
        self._settings = winners(runs, figures)
        return figures

    @property
    def settings(self) -> tuple[Setting, ...]:
        """Those that the next round tries."""
        return self._settings

    def _measure(self, setting: Setting) -> Figures:
        lines: list[str] = []
        for prompt_tokens, new_tokens, streams in batches(self._job):
            lines += self._run(setting, prompt_tokens, new_tokens, streams).splitlines()
        return parse(lines)

    def _run(self, setting: Setting, prompts: Sequence[int], new_tokens: int, streams: Sequence[int]) -> str:
        context = max(prompts) * max(streams) + max(streams) * new_tokens
        threads = str(self._job.threads)
        command = [str(self._binary), "-m", str(self._files[setting.form]), *setting.flags, "-c", str(context)]
        command += ["-t", threads, "-tb", threads, "-npp", _listed(prompts), "-ntg", str(new_tokens)]
        return run_peer(self.name, [*command, "-npl", _listed(streams), "--output-format", "jsonl"])


def batches(job: Job) -> Iterable[tuple[tuple[int, ...], int, tuple[int, ...]]]:
    """Prompt lengths, new tokens and numbers of streams that one run of the program measures in all combinations."""
    if job.sizes.prefill:
        yield job.sizes.prefill, 1, (1,)
    for new_tokens in sorted({decode_tokens(n) for n in job.sizes.decode}):
        yield (DECODE_PROMPT_TOKENS,), new_tokens, tuple(n for n in job.sizes.decode if decode_tokens(n) == new_tokens)


def parse(lines: Iterable[str]) -> Figures:
    """The figures in the program's output: a JSON object a measurement, among other lines."""
    rows = [json.loads(line) for line in lines if line.startswith("{")]
    prefill = {row["pp"]: row["t_pp"] for row in rows if row["tg"] == 1}
    decode = {row["pl"]: DecodeTime(row["t_pp"], row["t_tg"], row["pl"] * row["tg"]) for row in rows if row["tg"] > 1}
    return Figures.of_times(prefill, decode)


def winners(runs: Mapping[Setting, Figures], figures: Figures) -> tuple[Setting, ...]:
    """The settings that were best at some size, in the order of `runs`."""
    return tuple(setting for setting, run in runs.items() if _is_best_somewhere(run, figures))


def _is_best_somewhere(run: Figures, figures: Figures) -> bool:
    pairs = ((run.prefill, figures.prefill), (run.decode, figures.decode))
    return any(rates.get(size) == rate for rates, bests in pairs for size, rate in bests.items())


def _listed(values: Iterable[int]) -> str:
    return ",".join(map(str, values))
