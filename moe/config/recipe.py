"""Recipes: settings as a YAML file with one section per group and field names as keys."""

from pathlib import Path
from typing import Any

import yaml

from moetron.common.errors import ConfigError
from moetron.common.files import write_text
from moetron.common.recipes import recipe_names
from moetron.moe.config.schema.field import nearest
from moetron.moe.config.schema.settings import Settings, fields
from moetron.moe.config.synonyms import key_answer

MOST_VALUES = 100_000
"""Values of a recipe, with every alias written out."""


class _Loader(yaml.SafeLoader):
    """SafeLoader that refuses duplicate keys in place of keeping the last."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[Any] = set()
        for key_node, _ in node.value:
            if key_node.tag == "tag:yaml.org,2002:merge":  # `<<: *anchor`
                continue
            key = self.construct_object(key_node, deep=True)
            if not isinstance(key, str):
                raise yaml.MarkedYAMLError(
                    problem=f"key {key!r} is not text", problem_mark=key_node.start_mark
                )
            if key in seen:
                raise yaml.MarkedYAMLError(
                    problem=f"key {key!r} is given twice", problem_mark=key_node.start_mark
                )
            seen.add(key)
        return super().construct_mapping(node, deep)


def read(path: Path, source: str = "--config ") -> dict[str, dict[str, Any]]:
    """Read a recipe's values by group and field; only YAML itself is checked.

    Raises ConfigError, with the line if known, for a file that cannot be read or is not a mapping
    of mappings. ``source`` precedes the path in messages.
    """
    try:
        return loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        problems = [f"{error.strerror}{nearest(str(path), recipe_names())}"]
    except OSError as error:
        problems = [error.strerror or str(error)]
    except UnicodeDecodeError:
        problems = ["not a UTF-8 text file"]
    except yaml.YAMLError as error:
        problems = [_yaml_problem(error)]
    except ConfigError as error:
        problems = error.problems
    except RecursionError:
        problems = ["nested too deeply"]
    except ValueError as error:  # an integer of too many digits, a date that does not exist
        problems = [" ".join(str(error).split())]
    raise ConfigError([f"{source}{path}: {problem}" for problem in problems])


def loads(text: str) -> dict[str, dict[str, Any]]:
    """Parse a recipe's text; raise yaml.YAMLError for invalid YAML."""
    tree = yaml.load(text, Loader=_Loader)
    _count(tree, {})
    if not isinstance(tree, dict) or not tree:
        raise ConfigError(["must hold sections such as `model:`"])
    wrong = [name for name, section in tree.items() if not isinstance(section, dict | None)]
    if wrong:
        raise ConfigError([_no_section(str(name)) for name in wrong])
    return {name: dict(section or {}) for name, section in tree.items()}


def _count(node: Any, counts: dict[int, int]) -> int:
    """Return the values below ``node``, aliases written out; ``counts``: of containers, by id.

    Raises ConfigError if there are too many, or if a container holds itself.
    """
    if not isinstance(node, dict | list | tuple | set):
        return 1
    if (known := counts.get(id(node), 0)) > 0:
        return known
    if id(node) in counts:
        raise ConfigError(["an alias stands inside of what it stands for"])
    counts[id(node)] = 0  # its values are being counted
    parts = node.values() if isinstance(node, dict) else node
    total = 1 + sum(_count(part, counts) for part in parts)
    if total > MOST_VALUES:
        raise ConfigError([f"aliases stand for more than {MOST_VALUES:,} values"])
    counts[id(node)] = total
    return total


def _no_section(name: str) -> str:
    """Return the problem of a top-level key that is not a mapping."""
    home = {field: group for group, field, _ in fields()}
    if name in Settings.model_fields:
        return f"`{name}` must hold keys and values, indented"
    if name in home:
        return f"key `{name}` belongs under `{home[name]}:`, indented"
    return f"unknown section `{name}:`{key_answer(name, [*Settings.model_fields, *home])}"


def _yaml_problem(error: yaml.YAMLError) -> str:
    """Return a YAML error in one line, with its position."""
    if isinstance(error, yaml.MarkedYAMLError) and error.problem_mark is not None:
        mark = error.problem_mark
        return f"line {mark.line + 1}, column {mark.column + 1}: {error.problem}"
    return " ".join(str(error).split())


def dump(settings: Settings) -> str:
    """Return all settings as a recipe; reading it gives equal settings."""
    tree = settings.model_dump(mode="json")
    # Not allow_unicode: PyYAML would write U+0085 unescaped and read it as a line break.
    return yaml.safe_dump(tree, sort_keys=False, default_flow_style=None)


def write(settings: Settings, path: Path) -> None:
    """Write ``dump(settings)`` atomically."""
    write_text(path, dump(settings))
