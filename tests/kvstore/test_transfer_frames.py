"""The wire format between store nodes."""

import pytest

from perigee.kvstore.errors import MalformedFrame
from perigee.kvstore.transfer import frames
from perigee.kvstore.transfer.frames import Ask, Kind, Reply, RequestHead
from tests.kvstore.keys import chain

SECRET, OURS, THEIRS = b"secret", b"\1" * frames.NONCE_BYTES, b"\2" * frames.NONCE_BYTES


def test_a_proof_is_good_for_one_secret_one_side_and_one_conversation_only() -> None:
    proofs = {
        frames.proof(SECRET, "pulling", OURS, THEIRS),
        frames.proof(b"another", "pulling", OURS, THEIRS),
        frames.proof(SECRET, "serving", OURS, THEIRS),
        frames.proof(SECRET, "pulling", THEIRS, OURS),
        frames.proof(SECRET, "pulling", OURS, OURS),
    }
    assert {len(proof) for proof in proofs} == {frames.PROOF_BYTES}
    assert len(proofs) == 5


def test_a_hello_carries_its_nonce() -> None:
    assert frames.unpack_hello(frames.pack_hello(OURS)) == OURS


@pytest.mark.parametrize("start", [b"PRGE", b"PRGT\2\0", b"PRGT\0\1"])
def test_a_hello_of_another_protocol_or_version_is_malformed(start: bytes) -> None:
    with pytest.raises(MalformedFrame, match=r"allowed is"):
        frames.unpack_hello(start.ljust(frames.HELLO_BYTES, b"\0"))


def test_a_request_carries_its_keys() -> None:
    keys = chain("a", 3)
    data = frames.pack_request(Ask.PULL, keys, 1500)
    head = RequestHead.unpack(data[: frames.REQUEST_BYTES])
    assert head == RequestHead(Ask.PULL, 3, 1500)
    assert frames.unpack_keys(data[frames.REQUEST_BYTES :]) == keys


@pytest.mark.parametrize(("ask", "num_keys"), [(0, 1), (4, 1), (1, 0), (2, 0), (3, 1), (1, frames.MAX_KEYS + 1)])
def test_other_requests_are_malformed(ask: int, num_keys: int) -> None:
    data = bytes([ask, 0, 0, 0]) + num_keys.to_bytes(4, "little") + bytes(4)
    with pytest.raises(MalformedFrame, match="allowed"):
        RequestHead.unpack(data)


def test_a_key_that_is_asked_for_twice_is_malformed() -> None:
    with pytest.raises(MalformedFrame, match="twice"):
        frames.unpack_keys(b"".join(chain("a", 2) + chain("a", 1)))


@pytest.mark.parametrize("kind", Kind)
def test_a_reply_carries_every_field(kind: Kind) -> None:
    reply = Reply(kind, index=7, num_tokens=32, origin=1, size_bytes=1 << 40, address=2**64 - 1)
    assert len(reply.pack()) == frames.REPLY_BYTES
    assert Reply.unpack(reply.pack()) == reply


def test_other_replies_are_malformed() -> None:
    for kind in (0, max(Kind) + 1, 255):
        with pytest.raises(MalformedFrame, match="allowed"):
            Reply.unpack(bytes([kind]).ljust(frames.REPLY_BYTES, b"\0"))


def test_a_text_is_cut_to_what_the_other_side_accepts() -> None:
    text = frames.pack_text(Kind.REFUSED, "x" * 5000)
    reply = Reply.unpack(text[: frames.REPLY_BYTES])
    assert frames.check_text_bytes(reply) == len(text) - frames.REPLY_BYTES == frames.MAX_TEXT_BYTES
    with pytest.raises(MalformedFrame, match="text"):
        frames.check_text_bytes(Reply(Kind.SEGMENT, size_bytes=frames.MAX_TEXT_BYTES + 1))
