"""Errors that a user can act on: each names field, value, limit and remedy in one line."""


class LongspanError(Exception):
    """Base of every error that Longspan raises on purpose."""


class ConfigError(LongspanError, ValueError):
    """An engine option is wrong, or contradicts another or the model."""


class UnsupportedModelError(LongspanError, ValueError):
    """The model does something that Longspan can't do exactly, so it is refused by name."""


class InvalidRequestError(LongspanError, ValueError):
    """A prompt or a sampling parameter is wrong; the engine stays usable."""


class RankFailedError(LongspanError, RuntimeError):
    """A worker process died or raised; the engine has stopped every other rank."""


class EngineStoppedError(LongspanError, RuntimeError):
    """The engine was used after it had been closed, interrupted or had failed."""


class OverloadedError(LongspanError, RuntimeError):
    """Too many requests wait already; `retry_after` is in how many seconds to come again."""

    def __init__(self, message: str, retry_after: int = 1) -> None:
        super().__init__(message)
        self.retry_after = retry_after


class ServerError(LongspanError, RuntimeError):
    """A server that was asked can't be reached, or has refused; the message says why."""
