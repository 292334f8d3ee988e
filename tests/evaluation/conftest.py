"""Tests of the evaluation: texts without a model, then the packaged model on real ranks."""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parents[1] / "server"))  # `program`
