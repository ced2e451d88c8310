"""An initialisation that mimics what attention comes to in the end (after Trockman and Kolter, "Mimetic Initialization
of Self-Attention Layers").

From random weights attention looks everywhere alike, and learning to find something again begins with a long plateau.
Here it begins with an induction circuit (Olsson et al., "In-context Learning and Induction Heads"), if a noisy one:

- each head of the first layer looks a certain distance back, and writes what is there as S^distance A v, with a
  rotation S that all share and an A v that says which token it is;
- half of the heads of the last layer ask with S applied for what the keys are as they are. So a position is looked at
  if what came before it is what came up to here: the one after a like passage. The other half ask for what is like
  them, without S.

The layers between are as they were drawn. What is far away is thus found where attention is full, whatever the other
layers' gates (MoBA) leave out: a gate sees means, in which one passage of a block hardly shows. The first layer looks
at what is near, and so does its gate: the pairs of rotated dimensions that turn slowly rank blocks by their distance.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from perigee.workers.model.moonlight_config import MoonlightConfig

# Standard deviations: of embeddings, and as much again for the part that all have in common, which angles are made of;
# of latents before their norm; of A. They are large beside a step of the optimizer, which would undo them otherwise.
_EMBEDDING, _LATENT, _WRITTEN = 0.1, 0.1, 0.07
_VALUES = 0.5  # the length of values beside that of latents
_SHARPNESS = 40.0  # the product of query and key at the distance looked at, in each pair of rotated dimensions
_LIKENESS = 2**0.5  # the length of queries and keys beside that of latents


@torch.no_grad()
def mimic(weights: Mapping[str, Tensor], config: MoonlightConfig, generator: torch.Generator) -> None:
    """Changes the embedding and the attention's `weights`, which were drawn already; their names are a checkpoint's."""
    hidden = config.hidden_size
    common = torch.randint(2, (hidden,), generator=generator) * 2.0 - 1
    embedding = weights["model.embed_tokens.weight"]
    embedding.mul_(_EMBEDDING / embedding.std()).add_(common, alpha=_EMBEDDING)
    rotation = _orthogonal(hidden, hidden, generator)
    for layer in (0, config.num_layers - 1):
        prefix = f"model.layers.{layer}.self_attn"
        query = weights[f"{prefix}.q_proj.weight"].view(config.num_heads, -1, hidden)
        latent = weights[f"{prefix}.kv_a_proj_with_mqa.weight"]
        latent[: config.kv_lora_rank] *= _LATENT / latent.std()
        up = weights[f"{prefix}.kv_b_proj.weight"].view(config.num_heads, -1, config.kv_lora_rank)
        values = _orthogonal(config.value_dim, config.kv_lora_rank, generator)
        up[:, config.nope_dim :] = _VALUES * values
        if layer == 0:
            _look_back(query, latent, common, config)
            _write_rotated(weights[f"{prefix}.o_proj.weight"], rotation, config, generator)
        else:
            _look_at_the_like(query, latent, up, rotation, config, generator)


def _look_back(query: Tensor, latent: Tensor, common: Tensor, config: MoonlightConfig) -> None:
    """The rotated parts of queries and keys are constant, but for angles by which a head's queries are ahead."""
    frequencies = config.rope.inverse_frequencies(config.rope_dim)
    # After the norm an embedding is √2 shorter in what is common.
    direction = common * (2 * _SHARPNESS) ** 0.5 / config.hidden_size
    for pair, frequency in enumerate(frequencies):
        latent[config.kv_lora_rank + 2 * pair] += direction
        for distance, head in enumerate(query[:, config.nope_dim :], 1):
            angle = torch.tensor(frequency * distance)
            head[2 * pair] += angle.cos() * direction
            head[2 * pair + 1] -= angle.sin() * direction


def _write_rotated(out: Tensor, rotation: Tensor, config: MoonlightConfig, generator: torch.Generator) -> None:
    written = _WRITTEN * torch.randn(config.hidden_size, config.value_dim, generator=generator)
    for head in out.view(config.hidden_size, config.num_heads, -1).unbind(1):
        written = rotation @ written
        head.copy_(written)


def _look_at_the_like(
    query: Tensor, latent: Tensor, up: Tensor, rotation: Tensor, config: MoonlightConfig, generator: torch.Generator
) -> None:
    # What the norm between makes of a latent is about this.
    normed = latent[: config.kv_lora_rank] / (_LATENT * config.hidden_size**0.5)
    for head in range(config.num_heads):
        turned = _LIKENESS * _orthogonal(config.nope_dim, config.kv_lora_rank, generator)
        up[head, : config.nope_dim] = turned
        query[head, : config.nope_dim] = turned @ (normed if head % 2 else normed @ rotation)


def _orthogonal(rows: int, columns: int, generator: torch.Generator) -> Tensor:
    """Random, with orthonormal rows or columns."""
    square = torch.randn(max(rows, columns), max(rows, columns), generator=generator)
    basis: Tensor = torch.linalg.qr(square).Q
    return basis[:rows, :columns].contiguous()
