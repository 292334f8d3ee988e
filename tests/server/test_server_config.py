"""The options of a server."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

import longspan
from longspan.cli import app
from longspan.errors import ConfigError
from longspan.server.config import API_KEY, ServerConfig


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"port": 65536}, "port=65536 must be a whole number from 0 to 65535"),
        ({"port": -1}, "port=-1 must be"),
        (
            {"max_waiting_requests": 0},
            "max_waiting_requests=0 must be a whole number",
        ),
        ({"max_n": 0}, "max_n=0 must be"),
        ({"max_logprobs": -1}, "max_logprobs=-1 must be a whole number of at least 0"),
        ({"request_timeout": 0.0}, "request_timeout=0.0 must be above 0"),
        ({"heartbeat_interval": float("nan")}, "heartbeat_interval=nan must be above 0"),
        ({"drain_timeout": -1.0}, "drain_timeout=-1.0 must be at least 0"),
        ({"log_level": "loud"}, "log_level='loud' must be one of"),
        ({"api_key": ""}, "the API key is empty"),
        ({"ssl_keyfile": "key.pem"}, "belong together"),
        ({"ssl_keyfile": "no.pem", "ssl_certfile": "no.pem"}, "ssl_keyfile='no.pem' can't be read"),
    ],
)
def test_a_wrong_value_is_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message.replace("(", r"\(")):
        ServerConfig(**options)


def test_the_key_comes_from_the_option_or_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(API_KEY, raising=False)
    assert ServerConfig().key is None
    monkeypatch.setenv(API_KEY, "secret")
    assert ServerConfig().key == "secret"
    assert ServerConfig(api_key="other").key == "other"
    monkeypatch.setenv(API_KEY, "")
    with pytest.raises(ConfigError, match=API_KEY):
        ServerConfig()


def test_every_option_has_a_help_text_and_is_in_the_documentation() -> None:
    shown = CliRunner().invoke(app, ["serve", "--help"], env={"COLUMNS": "200"}).stdout
    documented = (Path(longspan.__file__).parents[1] / "docs/serving.md").read_text()
    for field in dataclasses.fields(ServerConfig):
        option = "--" + field.name.replace("_", "-")
        assert field.metadata["help"]
        assert option in shown
        assert f"`{option}`" in documented
