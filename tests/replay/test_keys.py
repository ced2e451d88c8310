"""Block keys of a trace's prompts."""

import pytest

from perigee.replay.errors import TraceError
from perigee.replay.keys import PromptKeys, output_keys
from perigee.replay.trace import TraceRequest


def request(input_tokens: int, *ids: int) -> TraceRequest:
    return TraceRequest(0.0, input_tokens, 1, ids, 512)


def test_prompts_share_the_keys_of_the_blocks_that_their_ids_share() -> None:
    keys = PromptKeys(512)
    one, other = keys.of(request(1536, 1, 2, 3)), keys.of(request(1536, 1, 2, 4))
    assert one[:2] == other[:2] and one[2] != other[2]


def test_a_block_of_the_trace_may_be_several_of_the_cluster() -> None:
    keys = PromptKeys(128)
    assert len(set(keys.of(request(1024, 1, 2)))) == 8
    assert keys.of(request(600, 1, 2)) == keys.of(request(600, 1, 2))


def test_a_partial_block_is_another_one_than_the_full_block() -> None:
    keys = PromptKeys(512)
    assert keys.of(request(600, 1, 2))[1] != keys.of(request(1024, 1, 2))[1]


def test_the_blocks_of_an_answer_are_nobody_elses() -> None:
    prompt = PromptKeys(512).of(request(600, 1, 2))
    one, other = (output_keys(prompt, name, 600, 2000, 512) for name in ("a", "b"))
    assert len(set(one)) == 4 and one[:1] == other[:1] == prompt[:1]
    assert not set(one[1:]) & set(other[1:])
    assert output_keys(prompt, "a", 600, 600, 512) == prompt


@pytest.mark.parametrize(
    ("block_tokens", "ids", "complaint"),
    [(500, (1, 2), "block_tokens: 500 given"), (512, (1, 1), "prefix_ids: .*one is there twice")],
)
def test_what_cannot_be_is_refused(block_tokens: int, ids: tuple[int, ...], complaint: str) -> None:
    with pytest.raises(TraceError, match=complaint):
        PromptKeys(block_tokens).of(request(1024, *ids))
