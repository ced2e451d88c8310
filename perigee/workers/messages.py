"""What workers say, as plain values."""

from dataclasses import dataclass

from perigee.workers.engine.sequence import FinishReason, Ref, Token


class WorkerLost(Exception):
    """The stream to a worker broke; nothing more will be heard of the sequences that it had."""


@dataclass(frozen=True, slots=True)
class PrefillDone:
    """The prompt is computed, its last blocks are being committed, and this is the first token.

    Cached tokens are counted by the tier that held them. Times are in seconds: `queue_s` until the first chunk ran,
    but for `load_s`, which leasing and copying the cached prefix took; `compute_s` from the first chunk to the token.
    """

    ref: Ref
    token: Token
    finish_reason: FinishReason = FinishReason.NOT_FINISHED
    cached_tokens_dram: int = 0
    cached_tokens_ssd: int = 0
    cached_tokens_remote: int = 0
    queue_s: float = 0.0
    load_s: float = 0.0
    compute_s: float = 0.0


@dataclass(frozen=True, slots=True)
class DecodeJoined:
    """The decode worker holds every block in pages of its own: prefill's leases may go."""

    ref: Ref


@dataclass(frozen=True, slots=True)
class StepOutput:
    """One generated token. `index` is its position in the output."""

    ref: Ref
    index: int
    token: Token
    finish_reason: FinishReason = FinishReason.NOT_FINISHED


@dataclass(frozen=True, slots=True)
class Failed:
    """This attempt is over. `code` is one of internal, blocks_missing, no_room, invalid, unknown."""

    ref: Ref
    code: str
    message: str


FromWorker = PrefillDone | DecodeJoined | StepOutput | Failed


@dataclass(frozen=True, slots=True)
class ModelCard:
    """What a worker serves, the same on every worker of a cluster. `namespace` is the root of the block keys."""

    name: str
    weights_digest: str
    config_digest: str
    tokenizer_digest: str
    dtype: str
    block_tokens: int
    max_context: int
    vocab_size: int
    namespace: bytes
    eos_token_ids: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class WorkerReport:
    """The state of a worker at one moment. Fields are those of `worker.proto`; totals count since its start."""

    worker_id: str
    incarnation: str
    role: str
    card: ModelCard
    queued_sequences: int = 0
    queued_prefill_tokens: int = 0
    running_sequences: int = 0
    context_tokens: int = 0
    free_pages: int = 0
    total_pages: int = 0
    max_sequences: int = 0
    last_step_s: float = 0.0
    draining: bool = False
    computed_prompt_tokens_total: int = 0
    cached_prompt_tokens_total: int = 0
    output_tokens_total: int = 0
    steps_total: int = 0


FAILURE_CODES = ("internal", "blocks_missing", "no_room", "invalid", "unknown")
