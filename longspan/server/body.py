"""The body of a request: what it names is known, supported, or changes nothing about the output.

Everything else is refused by name. OpenAI's names, and vLLM's extras.
"""

import difflib
from typing import Any, ClassVar

from pydantic import BaseModel, ConfigDict, Field, model_validator
from pydantic_core import PydanticCustomError

IGNORED = frozenset(
    {
        "metadata",
        "parallel_tool_calls",
        "prediction",
        "prompt_cache_key",
        "prompt_cache_options",
        "prompt_cache_retention",
        "request_id",
        "safety_identifier",
        "service_tier",
        "store",
        "user",
    }
)
"""What says nothing about the output's content."""

UNSUPPORTED: dict[str, tuple[Any, ...]] = {
    "allowed_token_ids": ([],),
    "bad_words": ([],),
    "cache_salt": (),
    "chat_template": (),
    "documents": ([],),
    "guided_choice": (),
    "guided_grammar": (),
    "guided_json": (),
    "guided_regex": (),
    "include_stop_str_in_output": (False,),
    "length_penalty": (1, 1.0),
    "logit_bias": ({},),
    "logits_processors": ([],),
    "prompt_logprobs": (),
    "response_format": ({"type": "text"},),
    "return_token_ids": (False,),
    "return_tokens_as_token_ids": (False,),
    "spaces_between_special_tokens": (True,),
    "structured_outputs": (),
    "truncate_prompt_tokens": (),
    "use_beam_search": (False,),
}
"""What is not supported, with the values under which it changes nothing; null is always one."""


class Body(BaseModel):
    """A request that names what it wants and nothing else."""

    model_config = ConfigDict(extra="forbid", strict=True, protected_namespaces=())

    unsupported: ClassVar[dict[str, tuple[Any, ...]]] = {}

    model: str | None = Field(None, description="The name in /v1/models; may be left out.")

    @model_validator(mode="before")
    @classmethod
    def _drop_what_changes_nothing(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            return data
        known = cls.model_fields.keys()
        given = {name: value for name, value in data.items() if value is not None}
        for name, value in list(given.items()):
            if name in known:
                continue
            if name in cls.unsupported:
                if value not in cls.unsupported[name]:
                    raise PydanticCustomError("unsupported", name + " is not supported")
            elif name not in IGNORED:
                near = difflib.get_close_matches(name, known, n=1)
                hint = f"; did you mean {near[0]!r}?" if near else ""
                raise PydanticCustomError("unknown", f"unknown field {_quoted(name)}{hint}")
            del given[name]
        return given


def _quoted(name: object) -> str:
    """A client's word, short and without braces, which pydantic would take for its own."""
    return repr(name)[:80].replace("{", "(").replace("}", ")")
