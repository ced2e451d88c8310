"""The configuration of `perigee profile`."""

from pathlib import Path

from pydantic import Field, SecretStr

from perigee.kvstore.addresses import ClusterProcess


class ProfileConfig(ClusterProcess, frozen=True, extra="forbid"):
    """Measures the workers of a running, idle cluster and fits the Conductor's cost model to them."""

    url: str = Field(
        "http://127.0.0.1:8000", pattern=r"^https?://[^/\s]+$", description="the cluster's API, without a path"
    )
    output: Path = Field(Path("perigee-profile.yaml"), description="profile to write, for `perigee up --profile`")
    max_tokens: int = Field(4096, ge=64, description="longest prompt to measure, if the model and its memory allow it")
    repeats: int = Field(3, ge=1, description="how often each size is measured, while there is time")
    seconds: float = Field(30.0, gt=0, description="time for each worker and phase, after which no more sizes follow")
    busy: bool = Field(
        False, description="measure decoding while the same host's prefill workers compute: they share its memory"
    )
    seed: int = Field(0, ge=0, description="of the prompts; another gives prompts that no cache holds")
    machine: str = Field("", description="what the profile calls the machine [default: the workers' host names]")
    date: str = Field("", description="what the profile calls the day [default: today]")
    json_file: str | None = Field(None, description="write profile and residuals as JSON; - is standard output")
    api_key: SecretStr | None = Field(None, description="Of the cluster's API, where it asks for one.")
