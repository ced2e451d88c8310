"""Between the values that the workers' code handles and the messages of `worker.proto`."""

from perigee.kvstore.blocks import NO_SALT, BlockKey
from perigee.workers import worker_pb2 as pb
from perigee.workers.engine.sequence import FinishReason, Ref, Sampling, Sequence, Token
from perigee.workers.messages import (
    FAILURE_CODES,
    DecodeJoined,
    Failed,
    FromWorker,
    ModelCard,
    PrefillDone,
    StepOutput,
    WorkerReport,
)


def ref_to_pb(ref: Ref) -> pb.Ref:
    return pb.Ref(request_id=ref.request_id, choice=ref.choice, attempt=ref.attempt)


def ref_from_pb(message: pb.Ref) -> Ref:
    return Ref(message.request_id, message.choice, message.attempt)


def sampling_to_pb(sampling: Sampling) -> pb.Sampling:
    return pb.Sampling(
        temperature=sampling.temperature,
        top_p=sampling.top_p,
        top_k=sampling.top_k,
        max_tokens=sampling.max_tokens,
        min_tokens=sampling.min_tokens,
        ignore_eos=sampling.ignore_eos,
        stop_token_ids=sampling.stop_token_ids,
        logprobs=sampling.logprobs,
        presence_penalty=sampling.presence_penalty,
        frequency_penalty=sampling.frequency_penalty,
    )


def sampling_from_pb(message: pb.Sampling) -> Sampling:
    return Sampling(
        temperature=message.temperature,
        top_p=message.top_p,
        top_k=message.top_k,
        max_tokens=message.max_tokens,
        min_tokens=message.min_tokens,
        ignore_eos=message.ignore_eos,
        stop_token_ids=tuple(message.stop_token_ids),
        logprobs=message.logprobs if message.HasField("logprobs") else None,
        presence_penalty=message.presence_penalty,
        frequency_penalty=message.frequency_penalty,
    )


def sequence_to_pb(sequence: Sequence) -> pb.Sequence:
    return pb.Sequence(
        ref=ref_to_pb(sequence.ref),
        token_ids=sequence.token_ids,
        prompt_len=sequence.prompt_len,
        block_keys=sequence.block_keys,
        sampling=sampling_to_pb(sequence.sampling),
        seed=sequence.seed,
        grammar=sequence.grammar,
        deadline_s=sequence.deadline_s,
        salt=sequence.salt,
        salt_block=sequence.salt_block,
        draw=sequence.draw,
    )


def sequence_from_pb(message: pb.Sequence) -> Sequence:
    return Sequence(
        ref=ref_from_pb(message.ref),
        token_ids=tuple(message.token_ids),
        prompt_len=message.prompt_len,
        block_keys=tuple(BlockKey(key) for key in message.block_keys),
        sampling=sampling_from_pb(message.sampling),
        seed=message.seed,
        grammar=message.grammar,
        deadline_s=message.deadline_s,
        salt=message.salt or NO_SALT,
        salt_block=message.salt_block,
        draw=message.draw,
    )


def token_to_pb(token: Token) -> pb.Token:
    return pb.Token(
        token=token.token,
        logprob=token.logprob,
        top_logprobs=[pb.TokenLogprob(token=t, logprob=logprob) for t, logprob in token.top_logprobs],
    )


def token_from_pb(message: pb.Token) -> Token:
    return Token(
        token=message.token,
        logprob=message.logprob if message.HasField("logprob") else None,
        top_logprobs=tuple((entry.token, entry.logprob) for entry in message.top_logprobs),
    )


def _reason_to_pb(reason: FinishReason) -> pb.FinishReason.ValueType:
    return pb.FinishReason.Value(reason.name)


def outputs_to_pb(outputs: list[StepOutput]) -> pb.FromWorker:
    """One message for all that a step produced."""
    return pb.FromWorker(
        step_outputs=pb.StepOutputs(
            outputs=[
                pb.StepOutput(
                    ref=ref_to_pb(output.ref),
                    index=output.index,
                    token=token_to_pb(output.token),
                    finish_reason=_reason_to_pb(output.finish_reason),
                )
                for output in outputs
            ]
        )
    )


def prefill_done_to_pb(done: PrefillDone) -> pb.FromWorker:
    return pb.FromWorker(
        prefill_done=pb.PrefillDone(
            ref=ref_to_pb(done.ref),
            token=token_to_pb(done.token),
            finish_reason=_reason_to_pb(done.finish_reason),
            cached_tokens_dram=done.cached_tokens_dram,
            cached_tokens_ssd=done.cached_tokens_ssd,
            cached_tokens_remote=done.cached_tokens_remote,
            queue_s=done.queue_s,
            load_s=done.load_s,
            compute_s=done.compute_s,
        )
    )


def joined_to_pb(joined: DecodeJoined) -> pb.FromWorker:
    return pb.FromWorker(decode_joined=pb.DecodeJoined(ref=ref_to_pb(joined.ref)))


def failed_to_pb(failed: Failed) -> pb.FromWorker:
    code = pb.Failed.Code.Value(failed.code.upper())
    return pb.FromWorker(failed=pb.Failed(ref=ref_to_pb(failed.ref), code=code, message=failed.message))


def from_worker(message: pb.FromWorker) -> list[FromWorker]:
    """What a worker's message says, in its order. Empty if it says nothing that is known here."""
    match message.WhichOneof("message"):
        case "prefill_done":
            return [_prefill_done(message.prefill_done)]
        case "decode_joined":
            return [DecodeJoined(ref_from_pb(message.decode_joined.ref))]
        case "step_outputs":
            return [_step_output(output) for output in message.step_outputs.outputs]
        case "failed":
            failed = message.failed
            return [Failed(ref_from_pb(failed.ref), FAILURE_CODES[failed.code], failed.message)]
        case _:
            return []


def _prefill_done(message: pb.PrefillDone) -> PrefillDone:
    return PrefillDone(
        ref=ref_from_pb(message.ref),
        token=token_from_pb(message.token),
        finish_reason=FinishReason(message.finish_reason),
        cached_tokens_dram=message.cached_tokens_dram,
        cached_tokens_ssd=message.cached_tokens_ssd,
        cached_tokens_remote=message.cached_tokens_remote,
        queue_s=message.queue_s,
        load_s=message.load_s,
        compute_s=message.compute_s,
    )


def _step_output(message: pb.StepOutput) -> StepOutput:
    return StepOutput(
        ref=ref_from_pb(message.ref),
        index=message.index,
        token=token_from_pb(message.token),
        finish_reason=FinishReason(message.finish_reason),
    )


def card_to_pb(card: ModelCard) -> pb.ModelCard:
    return pb.ModelCard(
        name=card.name,
        weights_digest=card.weights_digest,
        config_digest=card.config_digest,
        tokenizer_digest=card.tokenizer_digest,
        dtype=card.dtype,
        block_tokens=card.block_tokens,
        max_context=card.max_context,
        vocab_size=card.vocab_size,
        namespace=card.namespace,
        eos_token_ids=card.eos_token_ids,
    )


def card_from_pb(message: pb.ModelCard) -> ModelCard:
    return ModelCard(
        name=message.name,
        weights_digest=message.weights_digest,
        config_digest=message.config_digest,
        tokenizer_digest=message.tokenizer_digest,
        dtype=message.dtype,
        block_tokens=message.block_tokens,
        max_context=message.max_context,
        vocab_size=message.vocab_size,
        namespace=message.namespace,
        eos_token_ids=tuple(message.eos_token_ids),
    )


# Every field of WorkerReport but the card is a plain number or string of the same name on the wire.
_REPORT_FIELDS = tuple(name for name in WorkerReport.__slots__ if name != "card")


def report_to_pb(report: WorkerReport) -> pb.WorkerReport:
    fields = {name: getattr(report, name) for name in _REPORT_FIELDS}
    return pb.WorkerReport(card=card_to_pb(report.card), **fields)


def report_from_pb(message: pb.WorkerReport) -> WorkerReport:
    fields = {name: getattr(message, name) for name in _REPORT_FIELDS}
    return WorkerReport(card=card_from_pb(message.card), **fields)
