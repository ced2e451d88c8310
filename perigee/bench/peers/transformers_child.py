"""transformers, measured in a process of its own: takes a job as JSON and prints its figures as JSON.

Greedy tokens come from the same loop that its `generate` runs per token: one forward pass with the cache of the last.
"""

import json
import sys
import time
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from perigee.bench.workload import DECODE_PROMPT_TOKENS, DecodeTime, Sizes, decode_tokens, measure, prompt


def main() -> None:
    job = json.loads(sys.argv[1])
    torch.set_num_threads(job["threads"])
    model = AutoModelForCausalLM.from_pretrained(job["model"], dtype=getattr(torch, job["dtype"]))
    sizes = Sizes(tuple(job["prefill"]), tuple(job["decode"]))
    with torch.inference_mode():
        figures = measure(sizes, lambda n: _prefill_s(model, n), lambda n: _decode_time(model, n))
    sys.stdout.write(json.dumps(figures.as_json()) + "\n")


def _prefill_s(model: Any, length: int) -> float:
    token_ids = torch.tensor([prompt(length, model.config.vocab_size)])
    started = time.perf_counter()
    model(token_ids, use_cache=True, logits_to_keep=1).logits[:, -1].argmax(-1)
    return time.perf_counter() - started


def _decode_time(model: Any, streams: int) -> DecodeTime:
    prompts = [prompt(DECODE_PROMPT_TOKENS, model.config.vocab_size, salt) for salt in range(streams)]
    started = time.perf_counter()
    output = model(torch.tensor(prompts), use_cache=True, logits_to_keep=1)
    first_s = time.perf_counter()
    steps = decode_tokens(streams) - 1
    for _ in range(steps):
        tokens = output.logits[:, -1:].argmax(-1)
        output = model(tokens, past_key_values=output.past_key_values, use_cache=True)
    output.logits[:, -1:].argmax(-1)
    return DecodeTime(first_s - started, time.perf_counter() - first_s, streams * steps)


if __name__ == "__main__":
    main()
