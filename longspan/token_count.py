"""Numbers of tokens as people write them: 128K, 1M, 100k.

As in vLLM, a small letter is decimal and a capital binary: 1k is 1,000 and 1K is 1,024.
"""

import re

from longspan.errors import ConfigError

_UNITS = {
    "": 1,
    "k": 1000,
    "m": 1000**2,
    "g": 1000**3,
    "K": 1024,
    "M": 1024**2,
    "G": 1024**3,
}


def parse_tokens(name: str, text: str) -> int:
    """The number of tokens that an option gives: `131072`, `128K`, `1M`, `1.5m`.

    Raises:
        ConfigError: it isn't one, or not a whole number of at least 1.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([kmgKMG]?)", text.replace(",", "").replace("_", ""))
    tokens = float(match[1]) * _UNITS[match[2]] if match else 0.0
    if not match or tokens != int(tokens) or tokens < 1:
        raise ConfigError(
            f"{name}={text!r} must be a whole number of tokens, at least 1, as in 131072, 128K "
            "(x 1024) or 100k (x 1000)"
        )
    return int(tokens)


def show_tokens(tokens: int) -> str:
    """The shortest exact way to write a number of tokens that `parse_tokens` reads back."""
    for unit in "GMKgmk":
        if tokens and tokens % _UNITS[unit] == 0:
            return f"{tokens // _UNITS[unit]}{unit}"
    return f"{tokens:,}"
