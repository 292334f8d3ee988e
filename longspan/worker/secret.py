"""The secret that all nodes of an engine share."""

import os

from longspan.errors import ConfigError

__all__ = ["SECRET", "shared_secret"]

SECRET = "LONGSPAN_SECRET"
"""The environment variable with the secret."""

_MIN_SECRET_BYTES = 16


def shared_secret() -> bytes:
    """The secret of all nodes. Raises ConfigError if it is missing or too short."""
    value = os.environb.get(SECRET.encode(), b"")
    if len(value) < _MIN_SECRET_BYTES:
        found = f"has {len(value)} bytes, less than {_MIN_SECRET_BYTES}" if value else "is not set"
        raise ConfigError(
            f"nnodes above 1 needs the environment variable {SECRET}, the same on all nodes; it "
            f"{found}; make one with: openssl rand -hex 32"
        )
    return value
