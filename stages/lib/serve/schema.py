"""The parameters that `make serve` takes: what llama-server heeds, in bounds in which it stays up."""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

MAX_DEPTH = 64  # brackets in one another; llama.cpp's readers of schemas call themselves for each
MAX_SCHEMA = 20_000  # characters of a JSON schema or pattern
MAX_TEXTS = 16  # stops, prompts

Text = Annotated[str, Field(min_length=1)]
Limit = Annotated[int, Field(ge=1, le=2**31 - 1)]


class StreamOptions(BaseModel):
    """OpenAI's `stream_options`."""

    model_config = ConfigDict(extra="forbid", strict=True)
    include_usage: bool | None = None
    include_obfuscation: Literal[False] | None = None


class Parameters(BaseModel):
    """What chats and completions share. A key that is not here is refused: llama-server would ignore most of them."""

    model_config = ConfigDict(extra="forbid", strict=True)
    model: str | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    n: Literal[1] | None = None
    max_tokens: Limit | None = None
    stop: Text | Annotated[list[Text], Field(max_length=MAX_TEXTS)] | None = None
    seed: Annotated[int, Field(ge=0, lt=2**32)] | None = None
    temperature: Annotated[float, Field(ge=0, le=100)] | None = None
    top_p: Annotated[float, Field(ge=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=0, lt=2**31)] | None = None
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    repeat_penalty: Annotated[float, Field(gt=0, le=10)] | None = None
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    logit_bias: dict[Annotated[str, Field(pattern=r"^\d{1,9}$")], Annotated[float, Field(ge=-100, le=100)]] | None = (
        None
    )
    user: str | None = None  # these two and the three below change no answer
    metadata: dict[str, str] | None = None


class Chat(Parameters):
    """A request to /v1/chat/completions; `messages` are looked at by `templated`."""

    messages: Any
    max_completion_tokens: Limit | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    response_format: dict[str, Any] | None = None
    tools: list[dict[str, Any]] | None = None
    tool_choice: str | dict[str, Any] | None = None
    parallel_tool_calls: bool | None = None
    store: Literal[False] | None = None
    service_tier: Literal["auto", "default"] | None = None
    prompt_cache_key: str | None = None


class Completion(Parameters):
    """A request to /v1/completions: raw text, which no template and no system prompt touches."""

    prompt: str
    logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    echo: Literal[False] | None = None
    best_of: Literal[1] | None = None


UNUSED = ("user", "metadata", "store", "service_tier", "prompt_cache_key", "echo", "best_of", "n")


def checked(request: Any, kind: type[Parameters]) -> dict[str, Any]:
    """Return the parameters of `request` that are stated and change its answer. Raises `ValueError` with each fault."""
    if not isinstance(request, dict):
        raise ValueError(f"expected a JSON object; found {str(request)[:80]!r}")
    if deeper_than(request, MAX_DEPTH):
        raise ValueError(f"expected at most {MAX_DEPTH} brackets in one another")
    try:
        parameters = kind.model_validate(request)
    except ValidationError as error:
        raise ValueError("; ".join(dict.fromkeys(fault(each) for each in error.errors()))) from error
    return {name: value for name, value in parameters.model_dump(exclude_none=True).items() if name not in UNUSED}


def fault(error: Any) -> str:
    """Return one of pydantic's errors in a line."""
    name = ".".join(map(str, error["loc"]))
    if error["type"] == "extra_forbidden":
        return f"{name}: is not supported here; leave it out"
    return f"{name}: {error['msg']}; found {str(error['input'])[:80]!r}"


def deeper_than(value: Any, depth: int) -> bool:
    """Return whether lists and objects stand in one another more than `depth` times."""
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else []
    return depth == 0 or any(deeper_than(each, depth - 1) for each in inner if isinstance(each, dict | list))
