"""Between pages of the KV pool and block payloads in the store's arena.

Only the engine's thread calls these: it alone touches pages, so a page is never read while a step writes it.
"""

import torch
import xxhash
from torch import Tensor

from perigee.kvstore.blocks import HEADER_BYTES, PayloadHeader, PayloadLayout
from perigee.workers.attention.base import TORCH_DTYPES, KVPool


def write_payload(pool: KVPool, page: int, num_tokens: int, origin: int, payload: memoryview) -> None:
    """Writes the block of `num_tokens` in `page`, its centroids and its header into `payload`.

    What a partial block leaves of the payload is zeroed, since the checksum covers it.
    """
    layout = pool.layout
    source = pool.page(page, num_tokens)  # [layers, parts, tokens, width]
    tensors, centroids = payload_views(payload, layout)
    tensors[:, :, :num_tokens].copy_(source)
    tensors[:, :, num_tokens:].zero_()
    if pool.centroids is not None and num_tokens == layout.block_tokens:
        centroids.copy_(pool.centroids[:, page])  # what the gate saw
    else:
        # In float32, one reduction over a fixed axis, so the same tokens give the same centroid anywhere.
        torch.mean(source[:, 0], dim=1, dtype=torch.float32, out=centroids)
    checksum = xxhash.xxh3_64_intdigest(payload[HEADER_BYTES:])
    payload[:HEADER_BYTES] = PayloadHeader(num_tokens, origin, checksum).pack()


def read_payload(pool: KVPool, page: int, payload: memoryview) -> int:
    """Copies a block's tensors into `page` and returns how many tokens it holds. Raises ValueError for a bad header."""
    header = PayloadHeader.unpack(payload[:HEADER_BYTES])
    tensors, centroids = payload_views(payload, pool.layout)
    pool.page(page, header.num_tokens).copy_(tensors[:, :, : header.num_tokens])
    if pool.centroids is not None:
        pool.centroids[:, page] = centroids
    return header.num_tokens


def payload_views(payload: memoryview, layout: PayloadLayout) -> tuple[Tensor, Tensor]:
    """The tensors [layers, parts, block_tokens, width] and centroids [layers, width] of a payload, without a copy."""
    end = HEADER_BYTES + layout.tensor_bytes
    shape = (layout.num_layers, layout.parts, layout.block_tokens, layout.width)
    tensors = torch.frombuffer(payload[HEADER_BYTES:end], dtype=TORCH_DTYPES[layout.dtype]).view(shape)
    centroids = torch.frombuffer(payload[end : layout.end], dtype=torch.float32)
    return tensors, centroids.view(layout.num_layers, layout.width)
