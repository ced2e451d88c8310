"""From a worker's configuration to an engine that is ready to step, and the card of what it serves."""

from pathlib import Path

import torch

from perigee.kvstore.blocks import LAYOUT_VERSION, namespace, num_blocks
from perigee.workers.attention.base import KVPool
from perigee.workers.config import WorkerConfig, computes_prompts
from perigee.workers.engine.batcher import Batcher, BatchLimits
from perigee.workers.engine.engine import Engine, EngineTotals
from perigee.workers.engine.pages import PagePool
from perigee.workers.engine.runner import Runner
from perigee.workers.engine.sequence import Ref, Sampling, Sequence
from perigee.workers.memory import keep_freed_memory
from perigee.workers.messages import ModelCard
from perigee.workers.model.checkpoint import digests, eos_token_ids
from perigee.workers.model.config import ModelConfig
from perigee.workers.model.errors import UnsupportedModel
from perigee.workers.model.weights import load_model


def model_card(directory: Path, model: ModelConfig, config: WorkerConfig) -> ModelCard:
    """The card that every worker of this checkpoint, dtype and block size shows."""
    found = digests(directory)
    root = namespace(
        # The configuration decides what the weights compute: both name the model.
        weights_digest=f"{found.weights}/{found.config}",
        weights_epoch=0,
        adapter="",
        dtype=config.dtype,
        layout_version=LAYOUT_VERSION,
        block_tokens=config.block_tokens,
        # It changes what deeper layers cache.
        attention=model.moba.describe() if model.moba else "dense",
    )
    return ModelCard(
        name=config.served_model_name or Path(config.model).name.removesuffix(".gguf"),
        weights_digest=found.weights,
        config_digest=found.config,
        tokenizer_digest=found.tokenizer,
        dtype=config.dtype,
        block_tokens=config.block_tokens,
        max_context=max_context(model, config),
        vocab_size=model.vocab_size,
        namespace=root,
        eos_token_ids=eos_token_ids(directory),
    )


def max_context(model: ModelConfig, config: WorkerConfig) -> int:
    """Positions that a sequence may have. Raises UnsupportedModel if the model has fewer than are asked for."""
    if config.max_context > model.max_context:
        raise UnsupportedModel(f"--max-context: {config.max_context}: this model has {model.max_context} positions")
    return config.max_context or model.max_context


def load_engine(directory: Path, model: ModelConfig, config: WorkerConfig) -> Engine:
    """Loads the weights, takes the KV pool's memory, and runs a prompt so that the first request finds all warm."""
    keep_freed_memory()
    if config.threads:
        torch.set_num_threads(config.threads)
    limits = BatchLimits(
        max_batched_tokens=config.max_batched_tokens,
        max_sequences=config.max_sequences,
        max_context=max_context(model, config),
        prompts_just_in_time=computes_prompts(config.role),
        shared_prompt_tokens=config.shared_prompt_tokens,
    )
    num_pages = num_blocks(config.kv_tokens, config.block_tokens)
    # A tokenizer may know tokens that the model has no logits for.
    eos = frozenset(token for token in eos_token_ids(directory) if token < model.vocab_size)
    pool = KVPool(
        model.payload_layout(config.dtype, config.block_tokens), num_pages, with_centroids=model.moba is not None
    )
    runner = Runner(load_model(directory, model, config.dtype), pool, eos)
    engine = Engine(Batcher(PagePool(num_pages, config.block_tokens), limits, eos), runner)
    _warm_up(engine, limits)
    return engine


def _warm_up(engine: Engine, limits: BatchLimits) -> None:
    """One prompt chunk and a few tokens: what the libraries below build at first use, they build now."""
    length = min(limits.max_batched_tokens, limits.max_context - 4, 256)
    sampling = Sampling(temperature=0.0, max_tokens=4, ignore_eos=True)
    sequence = Sequence(Ref("warm-up"), (0,) * max(1, length), max(1, length), (), sampling)
    if engine.batcher.refusal(sequence, one_token=False):
        return
    engine.run_alone(sequence)
    engine.totals = EngineTotals()
