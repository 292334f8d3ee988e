"""What a server is told beside its engine's options. Command-line options are made of it."""

import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass

from longspan.config import option
from longspan.errors import ConfigError

API_KEY = "LONGSPAN_API_KEY"
"""The environment variable with the key, where other users of a host don't see it."""

LOG_LEVELS = ("debug", "info", "warning", "error")


@dataclass(frozen=True, kw_only=True)
class ServerConfig:
    """Everything that is fixed for the life of a server. Times are in seconds.

    Raises:
        ConfigError: a value is outside its limits; the message names field, value and limit.
    """

    host: str = option("127.0.0.1", "Address to listen at; 0.0.0.0 is every address of the host.")
    port: int = option(8000, "Port to listen at; 0 takes one that is free.")
    api_key: str | None = option(
        None, f"Key that clients must send; better given as {API_KEY} in the environment."
    )
    served_model_name: str | None = option(
        None, "Name of the model in requests and answers; MODEL as given if not set."
    )
    max_waiting_requests: int = option(
        1024, "Most sequences that wait for their ranks; more are refused with 429."
    )
    max_request_bytes: int = option(32 << 20, "Largest body of a request; 413 past it.")
    max_n: int = option(128, "Largest n, completions of one prompt.")
    max_output_tokens: int | None = option(
        None, "Largest max_tokens, and what requests without one get."
    )
    max_logprobs: int = option(20, "Most tokens at each position whose logprobs may be asked for.")
    request_timeout: float | None = option(
        None, "Seconds after which a request is ended with what it has."
    )
    health_timeout: float = option(
        60.0, "Seconds without a step, though there is work, after which /health fails."
    )
    heartbeat_interval: float = option(
        10.0, "Seconds of silence after which a stream gets a comment, so that it is kept open."
    )
    drain_timeout: float = option(
        30.0, "Seconds that running requests have to end after SIGTERM, before they are aborted."
    )
    allowed_origins: Sequence[str] | None = option(
        None, "Origin of web pages that may use the server (CORS); give it again for more."
    )
    ssl_keyfile: str | None = option(None, "File with the private key, to serve https.")
    ssl_certfile: str | None = option(None, "File with the certificate, to serve https.")
    log_level: str = option("info", f"Least level that is logged: {', '.join(LOG_LEVELS)}.")

    def __post_init__(self) -> None:
        for name, least in (
            ("port", 0),
            ("max_waiting_requests", 1),
            ("max_request_bytes", 1),
            ("max_n", 1),
            ("max_output_tokens", 1),
            ("max_logprobs", 0),
        ):
            value = getattr(self, name)
            if value is not None and value < least:
                raise ConfigError(f"{name}={value!r} must be a whole number of at least {least}")
        if self.port > 65535:
            raise ConfigError(f"port={self.port} must be a whole number from 0 to 65535")
        for name in ("request_timeout", "health_timeout", "heartbeat_interval"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ConfigError(f"{name}={value!r} must be above 0")
        if not self.drain_timeout >= 0:
            raise ConfigError(f"drain_timeout={self.drain_timeout!r} must be at least 0")
        if self.log_level not in LOG_LEVELS:
            raise ConfigError(f"log_level={self.log_level!r} must be one of {LOG_LEVELS}")
        if self.key == "":
            raise ConfigError(f"the API key is empty; set --api-key or {API_KEY}, or neither")
        self._check_tls()

    @property
    def key(self) -> str | None:
        """The key that clients must send, from the option or the environment; None for no key."""
        return os.environ.get(API_KEY) if self.api_key is None else self.api_key

    @property
    def scheme(self) -> str:
        return "https" if self.ssl_certfile else "http"

    @property
    def log_threshold(self) -> int:
        """The level as `logging` has it."""
        return logging.getLevelNamesMapping()[self.log_level.upper()]

    def _check_tls(self) -> None:
        if (self.ssl_keyfile is None) != (self.ssl_certfile is None):
            raise ConfigError("ssl_keyfile and ssl_certfile belong together; give both or neither")
        for name in ("ssl_keyfile", "ssl_certfile"):
            path = getattr(self, name)
            if path is not None and not os.access(path, os.R_OK):
                raise ConfigError(f"{name}={path!r} can't be read")
