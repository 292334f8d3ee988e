"""A calibration: the rates of a fleet as it was measured, in a JSON file."""

from pathlib import Path
from typing import Self

import msgspec

from longspan.cost.rates import Rates
from longspan.cost.samples import Samples
from longspan.errors import ConfigError

VERSION = 1


class _Version(msgspec.Struct):
    version: int


class Calibration(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What a fleet does, of what it is, and what it measured of itself.

    `ranks_per_host` are those of the fleet, `date` is in ISO 8601, `model` the one that was served;
    `samples` are those of each rank.
    """

    version: int = VERSION
    date: str
    device: str
    torch: str
    model: str
    ranks_per_host: tuple[int, ...]
    rates: Rates
    samples: tuple[Samples, ...]

    def save(self, path: str | Path) -> None:
        """Write the file. Raises ConfigError if it can't be written."""
        document = msgspec.json.format(msgspec.json.encode(self), indent=1)
        try:
            Path(path).write_bytes(document + b"\n")
        except OSError as error:
            raise ConfigError(f"calibration {path} can't be written: {error.strerror}") from None

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Read a file as `save` writes it.

        Raises:
            ConfigError: it can't be read, or is not a calibration of this version.
        """
        try:
            document = Path(path).read_bytes()
            version = msgspec.json.decode(document, type=_Version).version
            if version != VERSION:
                raise ConfigError(
                    f"calibration={str(path)!r} is of version {version}, not {VERSION}; make it "
                    "anew with `longspan calibrate`"
                )
            return msgspec.json.decode(document, type=cls)
        except OSError as error:
            raise ConfigError(
                f"calibration={str(path)!r} can't be read: {error.strerror}; make it with "
                "`longspan calibrate`"
            ) from None
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            raise ConfigError(
                f"calibration={str(path)!r} is not a file of `longspan calibrate`: {error}"
            ) from None
