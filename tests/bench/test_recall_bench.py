"""Prompts with pass keys in them, and what the built-in model makes of them through the engine."""

import json
import math
from pathlib import Path
from random import Random

import pytest

from perigee.bench.errors import BenchError
from perigee.bench.haystack import haystacks
from perigee.bench.heldout import MEASURED_LENGTH, token_rows
from perigee.bench.recall import RecallBenchConfig, run
from perigee.training.text import is_held_out
from perigee.workers.model.checkpoint import NANO, resolve
from perigee.workers.model.tokenizer import Tokenizer
from tests.tiny_llama import write

TEXT = "".join(f"Line {'i' * (index % 7)} of a text that says nothing of any key.\n" for index in range(3000))


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.load(resolve(NANO, "float32"))


def test_prompts_have_the_length_asked_for_and_state_each_fact_once(tokenizer: Tokenizer) -> None:
    needles = list(haystacks(tokenizer, TEXT, Random(1), 900, num_facts=3, count=5))
    assert [needle.depth for needle in needles] == [0.1, 0.3, 0.5, 0.7, 0.9]
    for needle in needles:
        assert 860 <= len(needle.prompt) <= 900
        text = tokenizer.decode(needle.prompt)
        assert text.count("The pass key of ") == 4 and text.count(needle.key) == 1
        assert text.index(needle.key) / len(text) == pytest.approx(needle.depth, abs=0.1)
        begun = text.splitlines()[-1]
        assert f"{begun} {needle.key}." in text


def test_prompts_are_the_same_again(tokenizer: Tokenizer) -> None:
    first, again = (list(haystacks(tokenizer, TEXT, Random(2), 300, num_facts=2, count=3)) for _ in range(2))
    assert first == again
    assert len({needle.prompt for needle in first}) == 3


def test_rows_are_spread_over_the_text(tokenizer: Tokenizer) -> None:
    rows = token_rows(tokenizer, TEXT, 3)
    tokens = tokenizer.encode(TEXT)
    assert [len(row) for row in rows] == [MEASURED_LENGTH] * 3
    assert rows[0] == tokens[:MEASURED_LENGTH] and rows[-1] == tokens[-MEASURED_LENGTH:]


def test_recall_and_loss_are_told_by_attention_and_length(tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text(TEXT)
    folder = _with_held_out_document(tmp_path)
    config = RecallBenchConfig(
        lengths=(512, 1024), trials=8, facts=1, loss_sequences=1, text=folder, json_file=str(tmp_path / "results.json")
    )
    assert run(config) == 0
    results = json.loads((tmp_path / "results.json").read_text())
    assert results["recall"].keys() == {"full", "moba_prefill", "moba"}
    assert all(recall.keys() == {"512", "1024"} for recall in results["recall"].values())
    # In 512 tokens the gates leave nothing out, in 1024 half of all blocks.
    assert min(value for recall in results["recall"].values() for value in recall.values()) >= 0.75
    assert results["heldout_loss"].keys() == {"full", "moba"}
    assert all(0 < loss < math.log(2048) for loss in results["heldout_loss"].values())


def _with_held_out_document(directory: Path) -> Path:
    """A folder with `TEXT`, changed until it is one of the documents that are held out."""
    folder = directory / "text"
    folder.mkdir()
    text = next(text for index in range(1000) if is_held_out(text := f"{TEXT}{index}\n"))
    (folder / "held-out.txt").write_text(text)
    return folder


def test_lengths_that_do_not_fit_and_models_without_moba_are_named(tmp_path: Path) -> None:
    with pytest.raises(BenchError, match=r"^--lengths: 16385; the model has 16384 positions"):
        run(RecallBenchConfig(lengths=(2048, 16385)))
    with pytest.raises(BenchError, match=r"^--lengths: 255; allowed are 256 or more"):
        run(RecallBenchConfig(lengths=(255,)))
    with pytest.raises(BenchError, match=r"^--moba: the checkpoint says nothing of MoBA"):
        run(RecallBenchConfig(model=str(write(tmp_path)), lengths=(256,)))
