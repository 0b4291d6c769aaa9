"""Recipes: settings as a YAML file, one section a group, field names as keys."""

from pathlib import Path
from typing import Any

import yaml

from moetron.common.errors import ConfigError
from moetron.common.files import write_text
from moetron.moe.config.schema.settings import Settings, fields
from moetron.moe.config.synonyms import key_answer


class _Loader(yaml.SafeLoader):
    """SafeLoader that refuses a key given twice instead of keeping the last."""

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
    """Group -> field -> value, unchecked beyond YAML itself; ``source`` is said before the path.

    Raises ConfigError, with the line where there is one, for a file that cannot be read or is not a
    mapping of mappings.
    """
    try:
        return loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        problems = [error.strerror or str(error)]
    except UnicodeDecodeError:
        problems = ["not a UTF-8 text file"]
    except yaml.YAMLError as error:
        problems = [_yaml_problem(error)]
    except ConfigError as error:
        problems = error.problems
    raise ConfigError([f"{source}{path}: {problem}" for problem in problems])


def loads(text: str) -> dict[str, dict[str, Any]]:
    """``read`` for text at hand; raises yaml.YAMLError for what is no YAML."""
    tree = yaml.load(text, Loader=_Loader)
    if not isinstance(tree, dict) or not tree:
        raise ConfigError(["must hold sections such as `model:`"])
    wrong = [name for name, section in tree.items() if not isinstance(section, dict | None)]
    if wrong:
        raise ConfigError([_no_section(str(name)) for name in wrong])
    return {name: dict(section or {}) for name, section in tree.items()}


def _no_section(name: str) -> str:
    """What is wrong with a top-level key that holds no mapping."""
    home = {field: group for group, field, _ in fields()}
    if name in Settings.model_fields:
        return f"`{name}` must hold keys and values, indented"
    if name in home:
        return f"key `{name}` belongs under `{home[name]}:`, indented"
    return f"unknown section `{name}:`{key_answer(name, [*Settings.model_fields, *home])}"


def _yaml_problem(error: yaml.YAMLError) -> str:
    """A YAML error in one line, with its place."""
    if isinstance(error, yaml.MarkedYAMLError) and error.problem_mark is not None:
        mark = error.problem_mark
        return f"line {mark.line + 1}, column {mark.column + 1}: {error.problem}"
    return " ".join(str(error).split())


def dump(settings: Settings) -> str:
    """All settings as a recipe; reading it back gives equal settings."""
    tree = settings.model_dump(mode="json")
    # Not allow_unicode: PyYAML writes U+0085 bare then, and reads it back as a line's end.
    return yaml.safe_dump(tree, sort_keys=False, default_flow_style=None)


def write(settings: Settings, path: Path) -> None:
    """Write ``dump(settings)`` atomically."""
    write_text(path, dump(settings))
