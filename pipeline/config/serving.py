"""What the server of a bundle takes on, here and on Modal. No address holds any of it."""

from typing import Annotated, Literal

from pydantic import Field

from .base import Bytes, Section

Dtype = Literal["fp32", "bf16", "auto"]


class ServeConfig(Section):
    """What a server takes on; each is a flag of `serve` too, and holds on Modal. No result depends
    on it, so no address does."""

    dtype: Dtype = Field(
        "fp32",
        description="What products run in (fp32, of adapters of tasks: as their base is held); "
        "auto: bf16 where this processor has it and every text stays what it is alone",
    )
    max_batch: int = Field(32, ge=1, le=1024, description="Texts that are generated at once")
    # A long prompt is read in pieces of these, so that it does not hold up the texts beside it.
    max_prefill_tokens: Annotated[int, Field(ge=1)] | Literal["auto"] = Field(
        "auto",
        description="Tokens of prompts that are read between two tokens of an answer; auto: by the "
        "model's size, 2,048 of up to 16 M parameters, 256 of more than 67 M (on a GPU 8 B, 34 B)",
    )
    max_cache: Bytes = Field(
        2 << 30,
        description="Keys and values of all texts; one that needs more runs alone",
    )
    max_waiting: int = Field(
        256,
        ge=1,
        description="Texts that wait for a place, of one client three quarters of them; requests "
        "beyond get 503",
    )
    max_new_tokens: int = Field(1024, ge=1, description="Tokens of an answer")
    max_context: int | None = Field(
        None,
        ge=2,
        description="Tokens of a prompt and its answer; none: what the model was trained on",
    )
    max_seconds: float = Field(
        120.0, gt=0, description="Seconds after which an answer ends where it is"
    )
    max_body_bytes: int | None = Field(
        None,
        ge=1,
        description="Bytes of a request; none: 1 MiB, 32 MiB where pictures are asked about",
    )
    max_connections: int = Field(
        512, ge=1, description="Connections that are open at once; Modal has a server in front"
    )
