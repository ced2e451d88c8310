"""transformers as the reference for outputs."""

from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from tests.e2e.endpoint import Answer, Prompt


@dataclass(frozen=True, slots=True)
class Reference:
    """A model of transformers in float32."""

    model: PreTrainedModel

    @classmethod
    def load(cls, directory: Path) -> "Reference":
        return cls(AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32))

    @torch.inference_mode()
    def assert_greedy(self, prompt: Prompt, answer: Answer) -> None:
        """Every token of the answer is what this model finds likeliest after all before it, and as likely as it says.

        So the answer is this model's own greedy output, token for token.
        """
        assert answer.token_ids
        ids = torch.tensor([[*prompt, *answer.token_ids[:-1]]])
        logits = self.model(ids, logits_to_keep=len(answer.token_ids), use_cache=False).logits[0]
        assert answer.token_ids == logits.argmax(dim=-1).tolist(), f"after a prompt of {len(prompt)} tokens"
        logprobs = torch.log_softmax(logits, dim=-1).gather(1, torch.tensor(answer.token_ids)[:, None])
        assert answer.logprobs == pytest.approx(logprobs[:, 0].tolist(), abs=1e-3)
