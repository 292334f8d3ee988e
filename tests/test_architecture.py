"""Imports run one way, files and functions stay small, and the public names are these."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

import longspan

ROOT = Path(longspan.__file__).parent
FILES = sorted(ROOT.rglob("*.py"))
MAX_FILE_LINES = 320
MAX_FUNCTION_LINES = 45

TENSORS = {"torch", "transformers", "safetensors", "huggingface_hub", "numpy"}

DECIDING = (
    "longspan.engine",
    "longspan.cost",
    "longspan.config",
    "longspan.errors",
    "longspan.topology",
)
"""Packages that decide, or that others are told by; they know of no tensors."""

MAY_IMPORT = {
    "longspan.attention": ("longspan.attention", "longspan.compiled"),
    "longspan.parallel": (
        "longspan.parallel",
        "longspan.attention",
        "longspan.plan",
        "longspan.topology",
    ),
    "longspan.cost": ("longspan.cost", "longspan.plan", "longspan.errors", "longspan.topology"),
    "longspan.cost.simulate": (
        "longspan.cost",
        "longspan.plan",
        "longspan.topology",
        "longspan.errors",
        "longspan.engine",
        "longspan.config",
        "longspan.sampling_params",
    ),
    "longspan.cost.forecast": (
        "longspan.cost",
        "longspan.plan",
        "longspan.topology",
        "longspan.engine",
        "longspan.config",
    ),
    "longspan.cost.capacity": (
        "longspan.cost",
        "longspan.token_count",
        "longspan.topology",
        "longspan.errors",
        "longspan.config",
    ),
}
"""What of Longspan these packages import and nothing else; a module of its own has its own line."""

MAY_NOT_IMPORT = {
    "longspan.worker": ("longspan.llm", "longspan.cli", "longspan.server"),
    "longspan.engine": ("longspan.worker", "longspan.parallel", "longspan.attention"),
    "longspan.server": ("longspan.worker", "longspan.parallel", "longspan.attention"),
}

IMPORTED_ALONE = (
    "longspan",
    "longspan.config",
    "longspan.plan",
    "longspan.engine.ledger",
    "longspan.engine.placement",
    "longspan.engine.scheduler",
    "longspan.engine.engine",
    "longspan.engine.completion",
    "longspan.engine.executor",
    "longspan.cost.strategy",
    "longspan.cost.choice",
    "longspan.cost.calibration",
    "longspan.cost.simulate",
    "longspan.cost.capacity",
    "longspan.capacity_table",
    "longspan.plot",
    "longspan.evaluation.sweep",
    "longspan.evaluation.table",
    "longspan.evaluation.heat_map",
)
"""Modules that a process without torch can import."""


def module_of(path: Path) -> str:
    parts = path.relative_to(ROOT.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def is_for_types_only(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and ast.unparse(node.test) in (
        "TYPE_CHECKING",
        "typing.TYPE_CHECKING",
    )


def run_time_nodes(node: ast.AST) -> Iterator[ast.AST]:
    """All nodes but those under `if TYPE_CHECKING:`; functions' bodies are run some time."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.If) and is_for_types_only(child):
            for statement in child.orelse:
                yield statement
                yield from run_time_nodes(statement)
        else:
            yield child
            yield from run_time_nodes(child)


def names_imported(path: Path) -> Iterator[str]:
    """Every module that a file imports at run time, by its full name."""
    for node in run_time_nodes(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path.name}:{node.lineno}: a relative import"
            assert node.module is not None
            names = [f"{node.module}.{alias.name}" for alias in node.names]
            yield from (name if name in modules() else node.module for name in names)


@cache
def modules() -> dict[str, Path]:
    return {module_of(path): path for path in FILES}


@cache
def imports() -> dict[str, frozenset[str]]:
    """What each module imports at run time."""
    return {module: frozenset(names_imported(path)) for module, path in modules().items()}


def is_within(module: str, packages: tuple[str, ...]) -> bool:
    return any(module == package or module.startswith(f"{package}.") for package in packages)


def reached(module: str) -> set[str]:
    """All modules that importing one imports, Longspan's own and others."""
    found: set[str] = set()
    new = {module}
    while new:
        found |= new
        new = {name for each in new for name in imports().get(each, ())} - found
    return found


def deciding_modules() -> list[str]:
    return [module for module in modules() if is_within(module, DECIDING)]


@pytest.mark.parametrize("module", deciding_modules())
def test_what_decides_imports_no_tensors(module: str) -> None:
    roots = {name.partition(".")[0] for name in reached(module)}
    assert not roots & TENSORS


@pytest.mark.parametrize("module", IMPORTED_ALONE)
def test_what_decides_is_imported_without_torch(module: str) -> None:
    check = f"import sys, {module}; print(sorted({TENSORS} & sys.modules.keys()))"
    done = subprocess.run([sys.executable, "-c", check], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize("package", MAY_IMPORT)
def test_a_layer_imports_only_those_below_it(package: str) -> None:
    for module in modules():
        if package == module or (is_within(module, (package,)) and module not in MAY_IMPORT):
            own = {name for name in imports()[module] if is_within(name, ("longspan",))}
            strange = {name for name in own if not is_within(name, MAY_IMPORT[package])}
            assert not strange, f"{module} imports {strange}"


@pytest.mark.parametrize("package", MAY_NOT_IMPORT)
def test_a_layer_imports_none_above_it(package: str) -> None:
    for module in modules():
        if is_within(module, (package,)):
            strange = {n for n in imports()[module] if is_within(n, MAY_NOT_IMPORT[package])}
            assert not strange, f"{module} imports {strange}"


def test_no_modules_import_each_other() -> None:
    own = {
        module: {name for name in names if name in modules() and name != module}
        for module, names in imports().items()
    }
    try:
        TopologicalSorter(own).prepare()
    except CycleError as error:
        pytest.fail(" -> ".join(error.args[1]))


@pytest.mark.parametrize("module", modules())
def test_a_file_is_short(module: str) -> None:
    assert len(modules()[module].read_text().splitlines()) <= MAX_FILE_LINES


def num_lines(function: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    """The lines of a function but for its docstring."""
    docstring = function.body[:1] if ast.get_docstring(function) else []
    spans = [(node.lineno, node.end_lineno or 0) for node in (function, *docstring)]
    (whole, *docs) = (last - first + 1 for first, last in spans)
    return whole - sum(docs)


@pytest.mark.parametrize("module", modules())
def test_a_function_fits_a_screen(module: str) -> None:
    for node in ast.walk(ast.parse(modules()[module].read_text())):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            lines = num_lines(node)
            assert lines <= MAX_FUNCTION_LINES, f"{node.name} has {lines} lines"


def test_matplotlib_is_needed_by_what_draws_and_not_to_import_it() -> None:
    users = {
        m for m, names in imports().items() if any(is_within(n, ("matplotlib",)) for n in names)
    }
    assert users == {"longspan.plot", "longspan.evaluation.heat_map"}
    imported = ", ".join(sorted(users))
    check = f"import sys, {imported}; print('matplotlib' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", check], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


def test_ray_is_needed_by_one_file() -> None:
    users = {m for m, names in imports().items() if any(is_within(n, ("ray",)) for n in names)}
    assert users == {"longspan.worker.ray_executor"}
    assert "longspan.worker.ray_executor" not in imports()["longspan.llm"]


def test_mpi4py_is_needed_by_one_file_which_only_what_starts_mpi_imports() -> None:
    users = {m for m, names in imports().items() if any(is_within(n, ("mpi4py",)) for n in names)}
    assert users == {"longspan.parallel.mpi_transport"}
    assert {m for m, names in imports().items() if names & users} == {"longspan.worker.mpi"}
    check = "import sys, longspan.worker.launch; print('mpi4py' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", check], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


def test_the_public_names_are_pinned() -> None:
    assert longspan.__all__ == [
        "LLM",
        "CompletionOutput",
        "Logprob",
        "RequestMetrics",
        "RequestOutput",
        "SamplingParams",
    ]
    for name in longspan.__all__:
        assert getattr(longspan, name).__name__ == name
    with pytest.raises(AttributeError, match="'longspan' has no attribute 'Engine'"):
        _ = longspan.Engine


def test_the_checks_see_what_they_forbid() -> None:
    """Imports are found wherever they stand, but for those under TYPE_CHECKING."""
    assert "transformers" in imports()["longspan.models"]
    assert "longspan.llm" in imports()["longspan"], "imported in a function"
    assert "longspan.errors" in imports()["longspan.worker.channel"], "`from longspan import`"
    assert "transformers" not in imports()["longspan.engine.completion"], "for types only"
    assert "torch" in reached("longspan.parallel.pass_kv")
    source = 'def f(x):\n    """Two\n    lines."""\n    return x\n'
    (function,) = ast.parse(source).body
    assert isinstance(function, ast.FunctionDef)
    assert num_lines(function) == 2
