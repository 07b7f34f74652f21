"""What may stand on a program's command line: its help, made of the fields' docstrings, and what is near a typo."""

from __future__ import annotations

import ast
import inspect
import itertools
import re
import types
from collections.abc import Iterator, Sequence
from dataclasses import MISSING, dataclass, fields, is_dataclass
from enum import Enum
from functools import cache
from typing import Any, Union, get_args, get_origin, get_type_hints

from omegaconf import OmegaConf
from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from glus.config.inference import ModelFolderConfig
from glus.config.loading import RENAMED, did_you_mean, nearest
from glus.files import PROJECT

_CONFIGS = PROJECT / "configs"
_OVERRIDE = re.compile(r"(\+{0,2}|~)([\w/][\w./+-]*)(@[\w.:]+)?(?:=(.*))?", re.DOTALL)
_MAX_DEFAULT = 40
"""Characters of a default in the help."""
_REQUIRED = "required"


@dataclass(frozen=True)
class _Setting:
    key: str
    """Dotted; ``<name>`` stands for any key of a dictionary."""
    of: Any
    """Its type, without None."""
    meaning: str


@cache
def meanings(schema: type) -> dict[str, str]:
    """Field -> its docstring, on one line; of inherited fields, too."""
    found: dict[str, str] = {}
    for parent in reversed(schema.__mro__[:-1]):
        (body,) = (node.body for node in ast.parse(inspect.getsource(parent)).body if isinstance(node, ast.ClassDef))
        for declared, text in itertools.pairwise(body):
            is_text = isinstance(text, ast.Expr) and isinstance(text.value, ast.Constant)
            if isinstance(declared, ast.AnnAssign) and isinstance(declared.target, ast.Name) and is_text:
                assert isinstance(text, ast.Expr)
                assert isinstance(text.value, ast.Constant)
                found[declared.target.id] = " ".join(str(text.value.value).split())
    return found


def settings(schema: Any, prefix: str = "", known: dict[Any, str] | None = None) -> Iterator[_Setting]:
    """All keys of a config; those of a class that occurs again stand at its first occurrence, in ``known``."""
    hints, texts, known = get_type_hints(schema), meanings(schema), {} if known is None else known
    for declared in fields(schema):
        key, of, text = prefix + declared.name, _plain(hints[declared.name]), texts.get(declared.name, "")
        if "overrides" in declared.metadata and not text:
            overridden = declared.metadata["overrides"]
            text = f"Instead of the model folder's {overridden}: {_meaning(ModelFolderConfig, overridden)}"
        value: Any = get_args(of)[1] if get_origin(of) is dict else of
        if is_dataclass(value) and value not in known:
            key += ".<name>" * (of is not value)
            known[value] = key
            yield from settings(value, f"{key}.", known)
        else:
            same = f" Fields as those of {known[value]}." if value in known else ""
            yield _Setting(key, of, text + same)


def _meaning(schema: Any, key: str) -> str:
    """Of a dotted key."""
    name, _, rest = key.partition(".")
    return _meaning(_plain(get_type_hints(schema)[name]), rest) if rest else meanings(schema)[name]


def _plain(of: Any) -> Any:
    """A type without the None that it may be instead."""
    options = [option for option in get_args(of) if option is not type(None)]
    return options[0] if get_origin(of) in (Union, types.UnionType) else of


def groups(program: str) -> list[str]:
    """Config groups that the defaults of ``configs/<program>.yaml`` choose from."""
    found = OmegaConf.to_container(OmegaConf.load(_CONFIGS / f"{program}.yaml"))
    assert isinstance(found, dict)
    entries = (name for entry in found["defaults"] if isinstance(entry, dict) for name in entry)
    return [str(name) for name in entries if not str(name).startswith("override ")]


def group_options(group: str) -> list[str]:
    """The files of a config group."""
    folder = _CONFIGS / group
    return sorted(file.relative_to(folder).with_suffix("").as_posix() for file in folder.rglob("*.yaml"))


def check_overrides(program: str, schema: type, arguments: Sequence[str]) -> None:
    """Refuse an override of what there is not, before Hydra does, which does not know what is near.

    Raises:
        ValueError: an unknown key, or an unknown option of a config group; the message names what is near.
    """
    has_own_groups = any(re.match(r"(--config-dir|-cd)|\+*hydra\.searchpath", argument) for argument in arguments)
    for argument in arguments:
        match = _OVERRIDE.fullmatch(argument)
        if match is None or not (match[1] or match[4]) or match[2].split(".")[0] == "hydra":
            continue
        key, value = match[2], match[4] or ""
        if key in groups(program) or match[3]:
            if not has_own_groups:
                _check_options(key, value)
        elif not _is_known(schema, key.split(".")):
            raise ValueError(unknown_key(program, schema, key))


def _check_options(group: str, value: str) -> None:
    options = group_options(group)
    for option in (word.strip(" '\"") for word in value.strip("[]").split(",")):
        if re.fullmatch(r"[\w./+-]+", option) and option not in (*options, "null"):
            near = nearest(option, options)
            raise ValueError(f"{group}={option}: {did_you_mean(near) or 'expected one of ' + ', '.join(options)}")


def _is_known(of: Any, parts: Sequence[str]) -> bool:
    of = _plain(of)
    if not parts or of is Any:
        return True
    if get_origin(of) is dict:
        return _is_known(get_args(of)[1], parts[1:])
    return is_dataclass(of) and parts[0] in (hints := get_type_hints(of)) and _is_known(hints[parts[0]], parts[1:])


def unknown_key(program: str, schema: type, key: str) -> str:
    """A message about a key that a config does not have."""
    keys = [*groups(program), *(setting.key for setting in settings(schema))]
    group, dot, last = key.rpartition(".")
    last = RENAMED.get(last, last)
    if f"{group}{dot}{last}" in keys:
        return f"unknown config key {key!r}: renamed to {group}{dot}{last}"
    ends = {known: known.split(".")[-1] for known in keys}
    near = [known for known, end in ends.items() if end == last]
    near = near or nearest(key, keys) or [known for known, end in ends.items() if end in nearest(last, ends.values())]
    return f"unknown config key {key!r}: {did_you_mean(near[:3]) or '--help lists all'}"


def print_help(console: Console, program: str, schema: type, about: str, composed: Any) -> None:
    """What the program does, the config groups it knows, and its settings as a table of override, default, meaning.

    Args:
        console: where.
        program: name of its file in ``configs``.
        schema: of its config.
        about: the program's docstring.
        composed: its config, from which the defaults come: under an experiment, those of the experiment.
    """
    console.print(escape(re.sub(r"``(.+?)``", r"\1", about.strip())), highlight=False, soft_wrap=True)
    console.print("\nGroups (group=option):", style="bold")
    options = Table(box=None, show_header=False, padding=(0, 2, 0, 2))
    for group in groups(program):
        options.add_row(group, escape(", ".join(group_options(group.split("@")[0]))))
    console.print(options)
    console.print("\nSettings (setting=value):", style="bold")
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1), pad_edge=False, collapse_padding=True)
    for name, width in (("override", 44), ("default", 22), ("meaning", None)):
        table.add_column(name, overflow="fold", max_width=width)
    section = ""
    rows = [(setting, _default(composed, setting.key)) for setting in settings(schema)]
    for setting, default in sorted(rows, key=lambda row: ("." in row[0].key, row[1] != _REQUIRED)):
        head = setting.key.rpartition(".")[0]
        if head != section:
            table.add_section()
            section = head
        table.add_row(escape(setting.key), escape(default), escape(short_help(setting)))
    console.print(table)
    console.print("Overrides beside --help change the defaults that it shows.")


def _default(composed: Any, key: str) -> str:
    value = composed
    for part in key.split("."):
        value = value.get(part, MISSING) if isinstance(value, dict) else MISSING
    if value is MISSING:
        return ""
    if isinstance(value, dict) and value:
        return f"{{{len(value)} entries}}"
    if value == "???":
        return _REQUIRED
    is_word = value is None or isinstance(value, bool)
    text = {None: "null", True: "true", False: "false"}[value] if is_word else str(value).replace("'", "") or "''"
    return text if len(text) <= _MAX_DEFAULT else f"{text[: _MAX_DEFAULT - 3]}..."


def short_help(setting: _Setting) -> str:
    """Its first sentence; of one with choices, all of it, and the choices where it does not name them."""
    text = setting.meaning.replace("``", "")
    if isinstance(setting.of, type) and issubclass(setting.of, Enum):
        names = [member.value for member in setting.of]
        return text if all(name in text for name in names) else f"{text} One of {', '.join(names)}.".strip()
    return re.split(r"(?<=[.;])\s(?=[A-Z`])", text)[0]
