"""The page on training names what the code knows; ``python -m tests.training.test_docs`` prints its last part."""

import re
import shlex
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import pytest
from pydantic import BaseModel
from pydantic_core import PydanticUndefined

from training.pretrain import OBJECTIVES
from training.recipe import _OF, RECIPES, DataRecipe, InitRecipe, Recipe, TokenizerRecipe, load_recipe
from training.tasks import TASKS
from wattle import _parser

ROOT = Path(__file__).parents[2]
PAGE_PATH = ROOT / "docs" / "training.md"
PAGE = PAGE_PATH.read_text(encoding="utf-8")
SHELL = [line for block in re.findall(r"```bash\n(.*?)```", PAGE, flags=re.DOTALL) for line in block.splitlines()]
EXAMPLES = sorted((RECIPES / "example").glob("*.toml"))


def parts() -> Iterator[tuple[str, type[BaseModel]]]:
    """Every table of a recipe, by its heading in TOML."""
    yield "", Recipe
    waiting: list[tuple[str, type[BaseModel]]] = [("", Recipe)]
    while waiting:
        heading, kind = waiting.pop(0)
        for name, field in kind.model_fields.items():
            found = _part_of(field.annotation)
            if found is not None and found.__module__ == "training.recipe":
                inner = f"{heading}.{name}" if heading else name
                yield inner, found
                waiting.append((inner, found))


def _part_of(annotation: Any) -> type[BaseModel] | None:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    return next((found for each in get_args(annotation) if (found := _part_of(each)) is not None), None)


def fields_of(kind: type[BaseModel]) -> list[str]:
    """A line of the table for each field."""
    lines = []
    for name, field in kind.model_fields.items():
        default = field.default
        shown = "required" if default is PydanticUndefined else f"`{default}`"
        if default in ((), {}, None, "") or isinstance(default, BaseModel):
            shown = "none"
        said = " ".join((field.description or "").replace("``", "`").replace("|", "\\|").split())
        lines.append(f"| `{field.alias or name}` | {shown} | {said} |")
    return lines


def tables() -> str:
    """The whole part of the page."""
    blocks = []
    for heading, kind in parts():
        title = f"### `[{heading}]`" if heading else "### The recipe"
        about = " ".join((kind.__doc__ or "").replace("``", "`").split())
        head = [title, "", about, "", "| field | default | meaning |", "|---|---|---|"]
        blocks.append("\n".join([*head, *fields_of(kind)]))
    return "\n\n".join(blocks)


@pytest.mark.parametrize("heading_kind", list(parts()), ids=lambda pair: pair[0] or "recipe")
def test_every_field_is_explained_as_the_code_has_it(heading_kind: tuple[str, type[BaseModel]]) -> None:
    lines = fields_of(heading_kind[1])
    assert [line for line in lines if line.endswith("|  |")] == [], "a field without a docstring below it"
    assert [line for line in lines if line not in PAGE.splitlines()] == [], "see the first lines of this file"


def test_its_tables_of_fields_are_whole() -> None:
    assert PAGE.rstrip().endswith(tables().rstrip())


def test_its_commands_exist() -> None:
    commands = [shlex.split(line) for line in SHELL if line.startswith("wattle")]
    assert len(commands) >= 7
    for _, *arguments in commands:
        _parser(arguments).parse_args(arguments)
        for path in arguments:
            assert not path.endswith(".toml") or (ROOT / path).exists(), path


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_its_examples_are_valid_and_named(path: Path) -> None:
    assert load_recipe(str(path)).name == path.stem
    assert str(path.relative_to(ROOT)) in PAGE


def test_it_knows_every_task_and_objective_and_what_each_reads() -> None:
    rows = {line.split("|")[1].strip().strip("`"): line for line in PAGE.splitlines() if line.startswith("|")}
    for name, task in TASKS.items():
        assert all(f"`{field}`" in rows[name] for fields in task.fields for field in fields), name
    for objective, architecture in _OF.items():
        assert f"`{architecture}`" in rows[objective]
    assert {*OBJECTIVES} == {*_OF}


def test_its_snippets_are_recipes() -> None:
    kinds = {"data": DataRecipe, "init": InitRecipe, "tokenizer": TokenizerRecipe}
    seen = 0
    for block in re.findall(r"```toml\n(.*?)```", PAGE, flags=re.DOTALL):
        for name, part in tomllib.loads(block).items():
            for each in part if isinstance(part, list) else [part]:
                kinds[name].model_validate(each)
                seen += 1
    assert seen == 3


def test_its_links_and_files_exist() -> None:
    shipped = {path.stem for path in RECIPES.glob("*.toml")}
    assert {"pretrain-en", "generate-en-pretrained", "readers-en"} <= shipped
    for name in re.findall(r"\]\(([^)#]+)\)", PAGE):
        assert (PAGE_PATH.parent / name).exists(), name


if __name__ == "__main__":
    print(tables())
