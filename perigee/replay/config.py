"""The configuration of a replay against a live endpoint."""

from pathlib import Path
from typing import Annotated

from pydantic import BaseModel, Field, SecretStr
from pydantic.types import StringConstraints

Url = Annotated[str, StringConstraints(pattern=r"^https?://[^/\s]+(/\S*)?$", strip_whitespace=True)]


class ReplayConfig(BaseModel, frozen=True, extra="forbid"):
    """An open-loop load test of a live endpoint from a request trace."""

    trace: Path = Field(description="request trace: Mooncake's JSON lines or Azure's CSV")
    url: Url = Field(default="http://127.0.0.1:8000", description="the endpoint, without /v1")
    limit: int | None = Field(default=None, ge=1, description="replay only the first so many requests")
    speed: float = Field(default=1.0, ge=1e-6, le=1e6, description="how many times as fast requests arrive")
    length_scale: float = Field(
        default=1.0,
        gt=0,
        allow_inf_nan=False,
        description="factor on all lengths; a trace block must stay a whole block",
    )
    slo_ttft_s: float | None = Field(
        default=None, gt=0, allow_inf_nan=False, description="goodput: longest time to first token, in seconds"
    )
    slo_tbt_s: float | None = Field(
        default=None, gt=0, allow_inf_nan=False, description="goodput: longest time between tokens, in seconds"
    )
    model: str | None = Field(default=None, description="model to ask for [default: the endpoint's first]")
    vocab_size: int | None = Field(
        default=None, ge=16, description="size of the model's vocabulary [default: what the endpoint says, else 32000]"
    )
    temperature: float = Field(default=0.0, ge=0, allow_inf_nan=False, description="sampling temperature; 0 is greedy")
    seed: int = Field(default=0, description="seed of the prompts' contents")
    timeout_s: float = Field(
        default=600.0, gt=0, allow_inf_nan=False, description="a request that takes longer has failed, in seconds"
    )
    observe: bool = Field(
        default=True,
        description="ask a Perigee endpoint every second what its workers carry, and for the receipt of each request",
    )
    json_file: str | None = Field(
        default=None, description="write the report as JSON to this file; - is standard output"
    )
    html: Path | None = Field(default=None, description="write the report as a page with plots to this file")
    api_key: SecretStr | None = Field(default=None, description="Of the endpoint, where it asks for one.")
