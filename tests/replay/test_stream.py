"""A stream is read however its bytes are cut."""

import json

import pytest

from perigee.replay.stream import CompletionStream, SseDecoder, StreamError, Usage


def event(payload: object) -> bytes:
    return b"data: " + json.dumps(payload).encode() + b"\n\n"


TOKEN = event({"choices": [{"text": "a\n\ndata: b"}], "usage": None})
USAGE = event({"choices": [], "usage": {"prompt_tokens": 9, "completion_tokens": 4}})
DONE = b"data: [DONE]\n\n"


def read(*received: bytes) -> CompletionStream:
    stream = CompletionStream()
    for number, part in enumerate(received):
        stream.feed(part, float(number))
    return stream


@pytest.mark.parametrize("size", [1, 2, 7, 1000])
def test_events_survive_any_cut(size: int) -> None:
    whole = b": comment\nevent: x\r\ndata: one\r\n\r\n" + b"data:two\n\n" + "data: drei ä\n\n".encode()
    decoder = SseDecoder()
    payloads = [p for start in range(0, len(whole), size) for p in decoder.feed(whole[start : start + size])]
    assert payloads == [b"one", b"two", "drei ä".encode()]


def test_usage_counts_and_chunks_tell_the_time() -> None:
    stream = read(TOKEN, TOKEN + TOKEN[:5], TOKEN[5:], USAGE + DONE)
    assert stream.token_times_s == [0.0, 1.0, 2.0]
    assert stream.finish() == Usage(prompt_tokens=9, completion_tokens=4)


@pytest.mark.parametrize(
    ("details", "cached"), [({"cached_tokens": 7}, 7), ({"cached_tokens": None}, 0), ({}, 0), (None, 0)]
)
def test_cached_tokens_are_zero_unless_told(details: dict[str, int | None] | None, cached: int) -> None:
    usage = {"prompt_tokens": 9, "completion_tokens": 4, "prompt_tokens_details": details}
    assert read(event({"choices": [], "usage": usage}), DONE).finish().cached_tokens == cached


@pytest.mark.parametrize(
    ("received", "kind"),
    [
        (TOKEN + USAGE, "truncated"),
        (TOKEN, "truncated"),
        (b"", "truncated"),
        (TOKEN + DONE, "no_usage"),
        (event({"error": {"message": "gone"}}), "stream_error"),
        (event([1]), "bad_chunk"),
        (b"data: {\n\n", "bad_chunk"),
        (event({"choices": [], "usage": {"prompt_tokens": "x"}}), "bad_chunk"),
    ],
)
def test_what_is_no_whole_answer_is_named(received: bytes, kind: str) -> None:
    with pytest.raises(StreamError) as raised:
        read(received).finish()
    assert raised.value.kind == kind
