"""transformers as the reference for outputs."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import compress
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3TopkRouter

from tests.e2e.endpoint import Answer, Prompt

# Of sigmoid scores. Rounding in bfloat16 moves them by a third of it.
CLEAR_MARGIN = 0.006


@dataclass(frozen=True, slots=True)
class Reference:
    """A model of transformers."""

    model: PreTrainedModel

    @classmethod
    def load(cls, directory: Path, dtype: torch.dtype = torch.float32) -> "Reference":
        return cls(AutoModelForCausalLM.from_pretrained(directory, dtype=dtype))

    def assert_greedy(self, prompt: Prompt, answer: Answer) -> None:
        """Every token of the answer is what this model finds likeliest after all before it, and as likely as it says.

        So the answer is this model's own greedy output, token for token.
        """
        logits = self._logits(prompt, answer)
        assert answer.token_ids == logits.argmax(dim=-1).tolist(), f"after a prompt of {len(prompt)} tokens"
        assert answer.logprobs == pytest.approx(_logprobs(logits, answer), abs=1e-3)

    def assert_probable(self, prompt: Prompt, answer: Answer, tolerance: float = 2e-2) -> None:
        """Every token of the answer is as likely as it says, in bfloat16.

        Where the choice of experts is nearly a tie, rounding decides which of two is taken. Such tokens are left out,
        and some of the others may differ, because they attend to such tokens of the prompt.
        """
        with self._margins() as margins:
            logprobs = _logprobs(self._logits(prompt, answer), answer)
        smallest = torch.stack([margin[-len(logprobs) :] for margin in margins]).amin(dim=0)
        clear = (smallest > CLEAR_MARGIN).tolist()
        assert sum(clear) > len(clear) / 2
        differences = [abs(ours - theirs) for ours, theirs in zip(answer.logprobs, logprobs, strict=True)]
        within = [difference < tolerance for difference in compress(differences, clear)]
        assert sum(within) >= 0.75 * len(within), f"after a prompt of {len(prompt)} tokens: {differences}"

    @contextmanager
    def _margins(self) -> Iterator[list[Tensor]]:
        """By how much each token prefers the last expert that it takes to the first that it leaves, of each layer."""
        margins: list[Tensor] = []

        def note(router: Any, arguments: object, output: tuple[Tensor, ...]) -> None:
            scores = output[0].float().sigmoid() + router.e_score_correction_bias
            best = scores.topk(router.top_k + 1).values
            margins.append(best[:, -2] - best[:, -1])

        routers = [module for module in self.model.modules() if isinstance(module, DeepseekV3TopkRouter)]
        hooks = [router.register_forward_hook(note) for router in routers]
        yield margins
        for hook in hooks:
            hook.remove()

    @torch.inference_mode()
    def _logits(self, prompt: Prompt, answer: Answer) -> Tensor:
        """What this model makes of the answer: [tokens, vocabulary]."""
        assert answer.token_ids
        ids = torch.tensor([[*prompt, *answer.token_ids[:-1]]])
        logits: Tensor = self.model(ids, logits_to_keep=len(answer.token_ids), use_cache=False).logits[0]
        return logits.float()


def _logprobs(logits: Tensor, answer: Answer) -> list[float]:
    own = torch.tensor(answer.token_ids)[:, None]
    logprobs: list[float] = torch.log_softmax(logits, dim=-1).gather(1, own)[:, 0].tolist()
    return logprobs
