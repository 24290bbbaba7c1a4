"""Imports run one way, so that each part can be read, changed and run without the others."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
# Each part, and the modules of other parts that it may import.
MAY_IMPORT: dict[str, tuple[str, ...]] = {
    "energy": (),
    "models": (),
    "training": ("energy", "models"),
    "service": ("energy", "models.manifest", "models.config", "models.processor", "models.sentences", "models.heads"),
    "loadtests": ("energy.charts", "energy.sheet"),  # speaks HTTP, and draws its pages with the same plots
}
# Engines are compared with engines, so these run ours without HTTP, in processes of their own; or our
# module in PyTorch, as somebody else would serve it.
EXCEPTIONS: dict[str, tuple[str, ...]] = {
    "loadtests/peers/wattle_worker.py": ("service.engine", "models.manifest"),
    "loadtests/peers/engine_loop.py": ("service.engine", "models.manifest"),
    "loadtests/peers/litserve_torch.py": ("models.manifest", "models.transformer", "models.weights"),
}
# What serving loads must stay light.
HEAVY = ("torch", "transformers")
LIGHT = ("energy", "service", "models.manifest", "models.config", "models.processor", "models.sentences")


def sources(part: str) -> list[Path]:
    return sorted((ROOT / part).rglob("*.py"))


def module_name(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def imports(nodes: Iterator[ast.AST], package: str) -> set[str]:
    """Absolute names that ``nodes`` import. ``from a import b`` counts as ``a.b``: b may be a module."""
    found = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                above = package.split(".")[: len(package.split(".")) - node.level + 1]
                base = ".".join([*above, base]).rstrip(".")
            found |= {f"{base}.{alias.name}" for alias in node.names}
    return found


def imports_of(path: Path) -> set[str]:
    name = module_name(path)
    package = name if path.name == "__init__.py" else name.rpartition(".")[0]
    return imports(ast.walk(ast.parse(path.read_bytes())), package)


def is_under(name: str, *modules: str) -> bool:
    return any(name == module or name.startswith(f"{module}.") for module in modules)


def outside_functions(tree: ast.Module) -> Iterator[ast.AST]:
    """The nodes that run, or could run, when the module is imported."""
    waiting: list[ast.AST] = [tree]
    while waiting:
        node = waiting.pop()
        yield node
        waiting += [
            child
            for child in ast.iter_child_nodes(node)
            if not isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        ]


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("import models.graph as g, torch", {"models.graph", "torch"}),
        ("from models import graph", {"models.graph"}),
        ("def late():\n    from training.loop import run", {"training.loop.run"}),
        ("if TYPE_CHECKING:\n    import training", {"training"}),
        ("from . import types", {"service.engine.types"}),
        ("from ..app import create_app", {"service.app.create_app"}),
        ("from .types import Item", {"service.engine.types.Item"}),
    ],
)
def test_every_form_of_import_is_seen(source: str, expected: set[str]) -> None:
    assert imports(ast.walk(ast.parse(source)), "service.engine") == expected


@pytest.mark.parametrize("part", MAY_IMPORT)
def test_a_part_imports_only_what_stands_below_it(part: str) -> None:
    wrong = [
        f"{path.relative_to(ROOT)} imports {name}"
        for path in sources(part)
        for name in sorted(imports_of(path))
        if is_under(name, *MAY_IMPORT, "wattle")
        and not is_under(name, part, *MAY_IMPORT[part], *EXCEPTIONS.get(str(path.relative_to(ROOT)), ()))
    ]
    assert wrong == []


def test_what_serving_loads_imports_nothing_heavy() -> None:
    wrong = [
        f"{path.relative_to(ROOT)} imports {name}"
        for part in MAY_IMPORT
        for path in sources(part)
        if is_under(module_name(path), *LIGHT)
        for name in sorted(imports_of(path))
        if is_under(name, *HEAVY)
    ]
    assert wrong == []


def test_the_shared_modules_need_only_the_standard_library_and_pydantic() -> None:
    allowed = {*sys.stdlib_module_names, "pydantic", "models"}
    shared = [path for path in sources("models") if is_under(module_name(path), *LIGHT)]
    wrong = [
        f"{path.name} imports {name}"
        for path in [*shared, ROOT / "models" / "__init__.py"]
        for name in sorted(imports_of(path))
        if name.partition(".")[0] not in allowed
        or (is_under(name, "models") and not is_under(name, *MAY_IMPORT["service"]))
    ]
    assert wrong == []


def test_the_command_line_imports_parts_only_inside_functions() -> None:
    tree = ast.parse((ROOT / "wattle.py").read_bytes())
    assert [name for name in sorted(imports(outside_functions(tree), "")) if is_under(name, *MAY_IMPORT)] == []


def test_importing_the_service_loads_neither_torch_nor_the_training() -> None:
    script = (
        "import sys, service.app\n"
        "print(*sorted({name.partition('.')[0] for name in sys.modules} & {'torch', 'transformers', 'training'}))"
    )
    result = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=False)
    assert (result.returncode, result.stdout.split()) == (0, []), result.stderr
