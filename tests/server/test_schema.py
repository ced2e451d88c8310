"""Requests are checked field by field, and the error says which field, what is allowed and what was sent."""

import json
from typing import Any

import pytest
from pydantic import ValidationError

from perigee.server.errors import InvalidRequest, from_validation
from perigee.server.schema import ChatRequest, CompletionRequest, GenerationRequest

COMPLETION: dict[str, Any] = {"model": "tiny", "prompt": "x"}
CHAT: dict[str, Any] = {"model": "tiny", "messages": [{"role": "user", "content": "x"}]}


def refusal(kind: type[GenerationRequest], body: Any) -> InvalidRequest:
    with pytest.raises(ValidationError) as caught:
        kind.model_validate_json(json.dumps(body))
    return from_validation(caught.value)


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"temperature": "warm"}, "temperature"),
        ({"temperature": 2.5}, "temperature"),
        ({"temperature": True}, "temperature"),
        ({"top_p": 0}, "top_p"),
        ({"top_k": 1.5}, "top_k"),
        ({"top_k": 2**32}, "top_k"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": "9"}, "max_tokens"),
        ({"n": 0}, "n"),
        ({"n": 2**32}, "n"),
        ({"seed": 2**64}, "seed"),
        ({"stop": 7}, "stop"),
        ({"stop": [""]}, "stop[0]"),
        ({"stop": ["x"] * 17}, "stop"),
        ({"stop_token_ids": ["a"]}, "stop_token_ids[0]"),
        ({"stream": "yes"}, "stream"),
        ({"stream_options": {"include_usage": True}}, "stream_options"),
        ({"presence_penalty": 3}, "presence_penalty"),
        ({"logit_bias": {"1": 5}}, "logit_bias"),
        ({"response_format": {"type": "json_object"}}, "response_format"),
        ({"model": None}, "model"),
    ],
)
@pytest.mark.parametrize(("kind", "body"), [(CompletionRequest, COMPLETION), (ChatRequest, CHAT)])
def test_a_bad_field_is_named(
    kind: type[GenerationRequest], body: dict[str, Any], change: dict[str, Any], param: str
) -> None:
    error = refusal(kind, body | change)
    assert error.param == param
    assert error.message.startswith(f"{param}: ")


def test_a_refused_object_is_shown_as_it_was_sent() -> None:
    error = refusal(CompletionRequest, COMPLETION | {"stream_options": {"include_usage": True}})
    assert error.message == "stream_options: only allowed with stream: true; got {'include_usage': True}"


@pytest.mark.parametrize(
    ("body", "param"),
    [
        (COMPLETION | {"prompt": []}, "prompt"),
        (COMPLETION | {"prompt": [1, "a"]}, "prompt"),
        (COMPLETION | {"prompt": [-1]}, "prompt"),
        (COMPLETION | {"prompt": {"a": 1}}, "prompt"),
        (COMPLETION | {"logprobs": 21}, "logprobs"),
        (COMPLETION | {"logprobs": 1, "echo": True}, "echo"),
        (COMPLETION | {"suffix": "y"}, "suffix"),
        (COMPLETION | {"best_of": 3}, "best_of"),
        ({"model": "tiny"}, "prompt"),
        ({"prompt": "x"}, "model"),
    ],
)
def test_a_bad_completion_request_is_refused(body: dict[str, Any], param: str) -> None:
    assert refusal(CompletionRequest, body).param == param


@pytest.mark.parametrize(
    ("body", "param"),
    [
        (CHAT | {"messages": []}, "messages"),
        (CHAT | {"messages": "x"}, "messages"),
        (CHAT | {"messages": [{"role": "wizard", "content": "x"}]}, "messages[0].role"),
        (CHAT | {"messages": [{"role": "user"}]}, "messages[0].content"),
        (CHAT | {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages[0].content"),
        (CHAT | {"top_logprobs": 2}, "top_logprobs"),
        (CHAT | {"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
        (CHAT | {"tools": [{"type": "function"}]}, "tools"),
    ],
)
def test_a_bad_chat_request_is_refused(body: dict[str, Any], param: str) -> None:
    assert refusal(ChatRequest, body).param == param


@pytest.mark.parametrize("number", ["NaN", "Infinity", "1e999"])
def test_numbers_are_finite(number: str) -> None:
    with pytest.raises(ValidationError):
        CompletionRequest.model_validate_json(f'{{"model": "m", "prompt": "x", "temperature": {number}}}')


@pytest.mark.parametrize(("asked", "drawn_with"), [(0, 0.0), (1e-300, 0.0), (9e-6, 0.0), (1e-5, 1e-5), (None, 1.0)])
def test_a_temperature_next_to_nothing_is_greedy(asked: float | None, drawn_with: float) -> None:
    request = CompletionRequest.model_validate_json(json.dumps(COMPLETION | {"temperature": asked}))
    assert request.sampling(5).temperature == drawn_with


def test_a_long_value_is_shortened_in_the_message() -> None:
    assert len(refusal(CompletionRequest, COMPLETION | {"stop": ["x" * 5000]}).message) < 200


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [("a", ("a",)), (["a", "b"], ("a", "b")), ([1, 2], ((1, 2),)), ([[1], [2, 3]], ((1,), (2, 3)))],
)
def test_every_form_of_prompt_is_understood(prompt: Any, expected: Any) -> None:
    assert CompletionRequest.model_validate_json(json.dumps(COMPLETION | {"prompt": prompt})).prompt == expected


def test_null_counts_as_left_out() -> None:
    nothing = dict.fromkeys(["max_tokens", "temperature", "stop", "n", "stream", "logprobs", "tools", "seed", "top_k"])
    request = ChatRequest.model_validate_json(json.dumps(CHAT | nothing))
    assert request.sampling(5) == ChatRequest.model_validate_json(json.dumps(CHAT)).sampling(5)


def test_unserved_parameters_may_have_the_value_that_changes_nothing() -> None:
    neutral = {"tools": [], "response_format": {"type": "text"}, "logit_bias": {}, "best_of": 1, "min_p": 0}
    ChatRequest.model_validate_json(json.dumps(CHAT | neutral))
