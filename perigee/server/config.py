"""All that a front end can be told."""

from pathlib import Path

from pydantic import Field, field_validator, model_validator

from perigee.kvstore.addresses import ClusterProcess, is_loopback
from perigee.kvstore.blocks import DType
from perigee.scheduler.slo import Slo, parse_classes


class ServerConfig(ClusterProcess, frozen=True, extra="forbid"):
    """The HTTP front end. Without API keys it serves this machine only."""

    host: str = Field("127.0.0.1", description="Address to listen on; other than loopback only with API keys.")
    port: int = Field(8000, ge=0, le=65535, description="TCP port to listen on; 0 takes a free one.")
    conductor: str = Field(description="gRPC target of the Conductor: host:port or unix:/path.")
    model: str = Field(
        description="Model whose tokenizer to use: a built-in name, a directory, a GGUF file or a Hugging Face name."
    )
    dtype: DType = Field("bfloat16", description="The workers' dtype; says which conversion of a GGUF file to read.")
    served_model_name: str | None = Field(None, description="Model name in the API; the workers' name if not given.")
    api_keys_file: Path | None = Field(
        None, description="File of API keys, `name:key` on each line; without it nobody is asked."
    )
    max_body_bytes: int = Field(16 << 20, ge=1024, description="Largest request body.")
    max_choices: int = Field(128, ge=1, description="Most choices (prompts times n) of one request.")
    slo_classes: tuple[str, ...] = Field(
        ("interactive=5:0.25", "batch=-:-"),
        description="What a request may ask for as its service_tier: NAME=TTFT:TBT, in seconds, - for no bound.",
    )
    default_slo_class: str = Field("batch", description="The one of a request that does not say.")
    default_max_tokens: int = Field(1024, ge=1, description="Output limit of a chat request that sets none.")
    request_timeout_s: float = Field(600.0, gt=0, description="Longest life of a request.")
    max_attempts: int = Field(8, ge=1, description="How often one choice is dispatched when workers fail.")
    recovery_wait_s: float = Field(60.0, ge=0, description="How long a failed request waits for room to go on.")
    conductor_wait_s: float = Field(10.0, gt=0, description="How long a request waits for an answer of the Conductor.")
    cluster_poll_s: float = Field(0.5, gt=0, description="How often the cluster's state is asked for.")
    shutdown_grace_s: int = Field(2, ge=0, description="How long running requests may go on after a stop signal.")

    @field_validator("slo_classes")
    @classmethod
    def _slo_classes_can_be_read(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        parse_classes(value)
        return value

    @model_validator(mode="after")
    def _default_slo_class_is_one(self) -> "ServerConfig":
        if self.default_slo_class not in self.slos:
            raise ValueError(f"default_slo_class: {self.default_slo_class!r}: allowed are {', '.join(self.slos)}")
        return self

    @property
    def slos(self) -> dict[str, Slo]:
        """The SLO of each class."""
        return parse_classes(self.slo_classes)

    @model_validator(mode="after")
    def _strangers_need_keys(self) -> "ServerConfig":
        if self.api_keys_file is None and not is_loopback(self.host):
            raise ValueError(
                f"host: {self.host!r} can be reached from other machines and there is no api_keys_file; "
                "allowed without API keys are 127.0.0.1, ::1 and localhost"
            )
        return self
