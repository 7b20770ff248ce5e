"""What clients send, and what they are told: all that asks for nothing passes, all else that is not known has its name."""

from __future__ import annotations

import json
import math
import pickle
from typing import Any

import openai.types.chat as chat_types
import pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient
from hypothesis import given
from hypothesis import strategies as st
from openai.types import Completion, completion_create_params
from openai.types.chat import ChatCompletion, ChatCompletionMessage
from openai.types.chat import completion_create_params as chat_params
from pydantic import BaseModel, ValidationError
from ray.exceptions import RayTaskError
from shoal_services.serving.engine.generation import (
    ContextExceeded,
    Delta,
    EngineFailed,
    Generation,
    OutOfMemory,
    Piece,
    RequestFailed,
    Token,
)
from shoal_services.serving.http.protocol import ChatRequest, CompletionRequest, TokenizeRequest
from shoal_services.serving.http.refusals import explain_body
from shoal_services.serving.http.web import add_error_shapes
from shoal_services.serving.http.writers import ChatWriter, CompletionWriter
from shoal_services.serving.replica.prompts import encode
from transformers import PreTrainedTokenizerBase

CHAT: dict[str, Any] = {"model": "m", "messages": [{"role": "user", "content": "Hello"}]}
TEXT: dict[str, Any] = {"model": "m", "prompt": "Hello"}


def refusal(model: type[BaseModel], body: Any) -> dict[str, Any]:
    with pytest.raises(ValidationError) as caught:
        model.model_validate(body)
    found = explain_body([{**error, "loc": ("body", *error["loc"])} for error in caught.value.errors()])["error"]
    json.dumps(found, ensure_ascii=False).encode()
    return found


# What asks for nothing


def test_every_parameter_of_openais_may_be_null():
    for name in {*chat_params.CompletionCreateParamsBase.__annotations__} - {"model", "messages"}:
        assert ChatRequest.model_validate(CHAT | {name: None}) == ChatRequest.model_validate(CHAT), name
    for name in {*completion_create_params.CompletionCreateParamsBase.__annotations__} - {"model", "prompt"}:
        assert CompletionRequest.model_validate(TEXT | {name: None}) == CompletionRequest.model_validate(TEXT), name
    for name in ("top_k", "ignore_eos", "stream"):
        assert ChatRequest.model_validate(CHAT | {name: None}) == ChatRequest.model_validate(CHAT)


@pytest.mark.parametrize("kind", ["User", "System", "Assistant", "Developer"])
def test_every_field_of_a_message_may_be_null(kind: str):
    fields = getattr(chat_types, f"ChatCompletion{kind}MessageParam").__annotations__
    empty = {name: None for name in fields if name not in ("role", "content")}
    ChatRequest.model_validate(CHAT | {"messages": [{**empty, "role": kind.lower(), "content": "Hello"}]})


@pytest.mark.parametrize("content", ["Hello", None])
def test_an_answer_can_be_sent_back(content: str | None):
    message = ChatCompletionMessage(role="assistant", content=content)
    for dumped in (message.model_dump(), message.model_dump(exclude_none=True) | {"content": content}, message.to_dict()):
        request = ChatRequest.model_validate(CHAT | {"messages": [*CHAT["messages"], dumped | {"annotations": []}]})
        assert request.messages[1].as_template_input() == {"role": "assistant", "content": content or ""}


@pytest.mark.parametrize(
    "empty",
    [
        {"tools": [], "tool_choice": "auto", "functions": [], "function_call": "none", "parallel_tool_calls": True},
        {"response_format": {"type": "text"}, "logit_bias": {}, "metadata": {}, "store": False, "modalities": ["text"]},
        {"service_tier": "auto", "stream_options": {}, "top_logprobs": 0, "stop": [], "top_k": -1, "max_tokens": None},
        {"stream": True, "stream_options": {"include_usage": None, "include_obfuscation": False}},
    ],
)  # fmt: skip
def test_what_asks_for_nothing_passes(empty: dict[str, Any]):
    request = ChatRequest.model_validate(CHAT | empty)
    assert (request.sampling(None), request.stop_strings) == (ChatRequest.model_validate(CHAT).sampling(None), ())


def test_a_message_may_be_in_parts_and_have_a_name():
    parts = [{"type": "text", "text": "Hel"}, {"type": "text", "text": "lo"}]
    request = ChatRequest.model_validate(CHAT | {"messages": [{"role": "user", "content": parts, "name": "Ann"}]})
    assert request.messages[0].as_template_input() == {"role": "user", "content": "Hello", "name": "Ann"}


# What is refused


@pytest.mark.parametrize(
    ("more", "says", "param"),
    [
        ({"tools": [{"type": "function"}]}, "unsupported parameter 'tools'", "tools"),
        ({"logit_bias": {"5": 100}}, "unsupported parameter 'logit_bias'", "logit_bias"),
        ({"response_format": {"type": "json_object"}}, "unsupported parameter 'response_format'", "response_format"),
        ({"temprature": 1}, "unsupported parameter 'temprature'; did you mean 'temperature'?", "temprature"),
        ({"nonsense": None}, "unsupported parameter 'nonsense'", "nonsense"),
        ({"top_logprobs": 3}, "top_logprobs is only allowed when logprobs is true", None),
        ({"max_tokens": 3, "max_completion_tokens": 4}, "say different things", None),
        ({"stop": ["a", ""]}, "stop.1: String should have at least 1 character", "stop.1"),
        ({"stop": ""}, "stop: String should have at least 1 character", "stop"),
        ({"stop": ["a"] * 5}, "stop: List should have at most 4 items after validation, not 5", "stop"),
        ({"stop": 5}, "stop: Input should be a text or a list of texts", "stop"),
        ({"messages": []}, "messages: List should have at least 1 item", "messages"),
        ({"messages": [{"role": "user", "content": None}]}, "messages.0.content: Input should be a text or a list", None),
        ({"messages": [{"role": "user", "content": 5}]}, "messages.0.content: Input should be a text or a list", None),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages.0.content.0.type: ", None),
        ({"messages": [{"role": "user", "content": [{"type": "text", "text": 5}]}]}, "messages.0.content.0.text: ", None),
        ({"messages": [{"role": "tool", "content": "x"}]}, "messages.0.role: Input should be 'system'", None),
        ({"messages": [{"role": "user", "contents": "x"}]}, "messages.0.content: Field required", None),
        ({"messages": [{"role": "user", "content": "x", "nam": "y"}]}, "did you mean 'name'?", "messages.0.nam"),
        ({"messages": [{"role": "user", "content": "\ud83d"}]}, "half a surrogate pair", None),
        ({"\ud83d": 1}, "half a surrogate pair", None),
        ({"temperature": math.nan}, "temperature: ", "temperature"),
        ({"top_p": math.inf}, "top_p: ", "top_p"),
        ({"temperature": 10**400}, "temperature: ", "temperature"),
    ],
)  # fmt: skip
def test_a_chat_that_cannot_be_used_is_refused_by_name(more: dict[str, Any], says: str, param: str | None):
    found = refusal(ChatRequest, CHAT | more)
    assert says in found["message"] and param in (None, found["param"])


@pytest.mark.parametrize(
    ("prompt", "says"),
    [
        ({}, "prompt: Input should be a text, a list of texts, token ids, or a list of token ids"),
        (None, "prompt: Input should be a text, a list of texts, token ids, or a list of token ids"),
        ([], "prompt: List should have at least 1 item"),
        (["a"] * 33, "prompt: List should have at most 32 items"),
        (["a", 5], "prompt.1: Input should be a valid string"),
        ([5, "a"], "prompt.1: Input should be a valid integer"),
        ([5, -1], "prompt.1: Input should be greater than or equal to 0"),
        ([5, 1.5], "prompt.1: Input should be a valid integer"),
        ([[5], []], "prompt.1: List should have at least 1 item"),
        ([[5], [5, -1]], "prompt.1.1: Input should be greater than or equal to 0"),
    ],
)
def test_the_complaint_is_of_the_form_that_was_given(prompt: Any, says: str):
    assert says in refusal(CompletionRequest, TEXT | {"prompt": prompt})["message"]


def test_more_choices_than_are_returned_are_refused():
    assert CompletionRequest.model_validate(TEXT | {"n": 3, "best_of": 3}).n == 3
    assert "best_of 4 is not supported" in refusal(CompletionRequest, TEXT | {"n": 3, "best_of": 4})["message"]


NAMES = st.sampled_from([*ChatRequest.model_fields, "prompt", "role", "content", "text", "tools", "\ud800"])
LEAVES = st.none() | st.booleans() | st.integers() | st.floats() | st.text(st.characters()) | st.just("user")


@given(st.recursive(LEAVES, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(NAMES, inner, max_size=5)))
def test_any_body_is_read_or_refused(body: Any):
    for model in (ChatRequest, CompletionRequest, TokenizeRequest):
        try:
            model.model_validate(body)
        except ValidationError as error:
            json.dumps(explain_body(error.errors()), ensure_ascii=False).encode()


def test_a_seed_stays_one_for_every_choice():
    for seed in (-(2**63), -1, 2**63 - 1):
        request = CompletionRequest.model_validate(TEXT | {"seed": seed})
        seeds = [request.sampling(None, choice).seed for choice in range(16)]
        assert len({*seeds}) == 16 and all(0 <= each < 2**63 for each in seeds if each is not None)


def test_what_a_template_raises_is_the_clients_to_hear(tokenizer: PreTrainedTokenizerBase):
    tokenizer.chat_template = (
        "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system here') }}{% endif %}"
        "{{ m.name + m.content }}{% endfor %}"
    )
    named = {"role": "user", "content": "Hello", "name": "Ann"}
    assert encode(tokenizer, (named,)) == encode(tokenizer, "AnnHello")
    for messages, says in (
        (({"role": "system", "content": "x"}, named), "no system here"),
        (({"role": "user", "content": "x"},), "name"),
    ):
        with pytest.raises(ValueError, match=f"chat template refuses these messages: .*{says}"):
            encode(tokenizer, messages)


def test_a_context_that_is_exceeded_has_its_code_and_numbers():
    with pytest.raises(ContextExceeded, match=r"context length is 4 tokens; 3 in the prompt and 2 .* are 5") as caught:
        Generation((1, 2, 3), 2).check_length(4)
    assert caught.value.code == "context_length_exceeded"


# What is answered


def spelled(text: str, data: bytes | None, **more: Any) -> Token:
    return Token(0, text, -1.0, spelled=data, **more)


PARTS = (
    spelled("é", "é".encode()), spelled("bytes:\\xe4", b"\xe4"), spelled("bytes:\\xb8\\xad", b"\xb8\xad"),
    Token(0, "!", -math.inf, spelled=b"!", top=(spelled("bytes:\\xff", b"\xff"),)), spelled("<|end|>", None),
)  # fmt: skip


def test_offsets_count_characters_and_bytes_make_up_the_text():
    piece = Piece(Delta("é中!", PARTS, "stop"), 1)
    completion = Completion.construct(**CompletionWriter("m", 1).answer([piece]))
    logprobs = completion.choices[0].logprobs
    assert logprobs is not None and logprobs.text_offset == [0, 1, 1, 2, 3]
    assert logprobs.token_logprobs == [-1, -1, -1, -9999, -1]
    answer = ChatWriter("m", 1).answer([piece])
    json.dumps(answer, allow_nan=False)
    content = ChatCompletion.construct(**answer).choices[0].logprobs.content  # type: ignore[union-attr]
    assert b"".join(bytes(token.bytes or ()) for token in content or ()).decode() == "é中!"
    assert content is not None and content[-1].bytes is None and content[3].top_logprobs[0].bytes == [255]


def test_streamed_offsets_are_those_of_the_whole():
    writer = CompletionWriter("m", 1)
    chunks = [writer.chunk(0, Delta(tokens=(token,))) for token in PARTS]
    assert [offset for chunk in chunks for offset in chunk["choices"][0]["logprobs"]["text_offset"]] == [0, 1, 1, 2, 3]


def test_a_prompt_with_several_choices_is_counted_once():
    pieces = [Piece(Delta("x", (Token(1), Token(2)), "stop"), size) for size in (7, 7, 7, 9, 9, 9)]
    writer = CompletionWriter("m", 3)
    usage = {"prompt_tokens": 16, "completion_tokens": 12, "total_tokens": 28}
    assert writer.answer(pieces)["usage"] == usage
    assert writer.usage_chunk({index: piece.num_prompt_tokens for index, piece in enumerate(pieces)}, 12)["usage"] == usage


@pytest.mark.parametrize(
    ("cause", "status", "code"),
    [
        (ContextExceeded("too long"), 400, "context_length_exceeded"),
        (ValueError("no such thing"), 400, None),
        (RequestFailed("this request failed"), 500, None),
        (OutOfMemory("no memory for it now"), 503, None),
        (EngineFailed("the variant cannot answer now"), 503, None),
    ],
)
def test_what_a_replica_raises_has_the_status_that_tells_whether_to_ask_again(
    cause: Exception, status: int, code: str | None
):
    app = FastAPI()
    add_error_shapes(app)

    @app.get("/")
    def answer() -> None:
        raise RayTaskError("generate", "a traceback", pickle.loads(pickle.dumps(cause))).as_instanceof_cause()

    response = TestClient(app).get("/")
    assert response.status_code == status
    assert str(cause) in response.json()["error"]["message"] and response.json()["error"]["code"] == code
