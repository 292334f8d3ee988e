from collections.abc import Callable
from pathlib import Path

import pytest
import zoo


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Builds a model of the zoo once for all tests."""
    built: dict[str, Path] = {}

    def build(name: str) -> Path:
        if name not in built:
            built[name] = zoo.build(name, tmp_path_factory.mktemp(name))
        return built[name]

    return build
