"""The rules of the house, read from the source: layers, borders to other libraries, documentation, size."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
LAYERS = (
    {"config", "types", "batch", "tokens", "files", "distributed", "log", "compat", "pictures"},
    {"data", "models", "losses"},
    {"train", "inference", "evaluation", "shapes"},
)
"""Modules and packages of ``glus``, the lowest layer first. Above them, ``scripts`` and ``tools`` may import all."""
BORDERS = {
    "sam2": "glus/models/segmenter/sam2.py",
    "deepspeed": "glus/train/engine.py",
    "wandb": "glus/log.py",
    "decord": "glus/data/frames.py",
    "bitsandbytes": "glus/models/mllm/adapters.py",
}
"""Libraries that one file alone imports."""
FORBIDDEN_NAMES = {"utils", "util", "misc", "helper", "helpers", "common"}
MAX_FUNCTION_LINES = 60

GLUS_FILES = sorted((ROOT / "glus").rglob("*.py"))
FILES = [*GLUS_FILES, *sorted((ROOT / "scripts").glob("*.py")), *sorted((ROOT / "tools").rglob("*.py"))]
Function = ast.FunctionDef | ast.AsyncFunctionDef


def _name(file: Path) -> str:
    return file.relative_to(ROOT).as_posix()


def _tree(file: Path) -> ast.Module:
    return ast.parse(file.read_text(), filename=str(file))


def _imports(file: Path) -> set[str]:
    """Dotted names that a file imports anywhere, also inside functions; ``from a import b`` gives ``a.b``."""
    found: set[str] = set()
    for node in ast.walk(_tree(file)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{_name(file)}:{node.lineno}: relative import"
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def _part(dotted: str) -> str | None:
    """``glus.models.mllm.llava.X`` -> ``models``; None for other libraries and for ``glus`` itself."""
    pieces = dotted.split(".")
    return pieces[1] if pieces[0] == "glus" and len(pieces) > 1 and not pieces[1].startswith("__") else None


def _layer(part: str) -> int:
    found = [level for level, parts in enumerate(LAYERS) if part in parts]
    assert found, f"glus.{part} is in no layer"
    return found[0]


@pytest.mark.parametrize("file", GLUS_FILES, ids=_name)
def test_imports_go_down_only(file: Path) -> None:
    """Never up, and never from a package to its sibling; the single files of the lowest layer know each other."""
    own = file.relative_to(ROOT / "glus").with_suffix("").parts[0]
    if own == "__init__":
        # Only what `glus.segment` needs, which test_import_glus_is_light shows to be loaded late.
        assert {name for name in _imports(file) if _part(name)} == {"glus.inference.segment.segment"}
        return
    for part in {_part(name) for name in _imports(file)} - {None, own}:
        assert part is not None
        is_down = _layer(part) < _layer(own)
        assert is_down or _layer(part) == _layer(own) == 0, f"{_name(file)} imports glus.{part}"


def test_every_part_has_a_layer() -> None:
    parts = {file.relative_to(ROOT / "glus").with_suffix("").parts[0] for file in GLUS_FILES} - {"__init__"}
    assert parts == set().union(*LAYERS)


def test_the_lowest_layer_has_no_cycle() -> None:
    needs: dict[str, set[str | None]] = {part: set() for part in LAYERS[0]}
    for file in GLUS_FILES:
        own = file.relative_to(ROOT / "glus").with_suffix("").parts[0]
        if own in needs:
            needs[own] |= {_part(name) for name in _imports(file)} & LAYERS[0] - {own}
    while needs:
        free = [part for part, others in needs.items() if not others & needs.keys()]
        assert free, f"import each other: {sorted(needs)}"
        for part in free:
            del needs[part]


def test_scoring_loads_neither_models_nor_torch() -> None:
    """Also not by way of other modules: each of its processes starts in a second, and needs no GPU."""
    modules = [".".join(f.relative_to(ROOT).with_suffix("").parts) for f in (ROOT / "glus/evaluation").rglob("*.py")]
    code = f"""
import importlib, runpy, sys
for name in {modules!r}:
    importlib.import_module(name)
for script in ("score", "submit", "compare"):
    runpy.run_path(f"scripts/{{script}}.py")
assert "glus.evaluation.score" in sys.modules
loaded = {{"torch", "transformers", "deepspeed", "glus.models", "glus.train"}} & set(sys.modules)
assert not loaded, loaded
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stderr


def test_glus_never_imports_what_stands_above_it() -> None:
    for file in GLUS_FILES:
        assert not {name.split(".")[0] for name in _imports(file)} & {"scripts", "tools", "tests"}, _name(file)


@pytest.mark.parametrize(("library", "home"), BORDERS.items())
def test_a_library_behind_a_border_is_imported_in_one_file(library: str, home: str) -> None:
    users = {_name(file) for file in FILES if library in {name.split(".")[0] for name in _imports(file)}}
    assert users <= {home}
    mentions = f'"{library}"' in (ROOT / home).read_text()  # importlib.resources.files("sam2")
    assert users == {home} or mentions


def test_hydra_stays_at_the_entry() -> None:
    users = {_name(file) for file in GLUS_FILES if any(name.split(".")[0] == "hydra" for name in _imports(file))}
    assert users == {"glus/models/segmenter/sam2.py"}


def test_import_glus_is_light() -> None:
    code = "import glus, sys; assert not {'torch', 'numpy', 'hydra'} & set(sys.modules); print(glus.__version__)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stderr


def test_every_module_imports_without_gpu_network_or_launcher(tmp_path: Path) -> None:
    """And starts nothing: no process group, no Hydra, no GPU context, no socket to anywhere."""
    modules = [".".join(file.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__") for file in GLUS_FILES]
    code = f"""
import importlib, socket
def refuse(*args, **kwargs):
    raise AssertionError("network at import")
socket.socket.connect = refuse
for name in {modules!r}:
    importlib.import_module(name)
import torch
from hydra.core.global_hydra import GlobalHydra
assert not torch.distributed.is_initialized()
assert not GlobalHydra.instance().is_initialized()
assert not torch.cuda.is_initialized()
"""
    launcher = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT", "SLURM_PROCID")
    environment = {name: value for name, value in os.environ.items() if name not in launcher}
    environment |= {"CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path, env=environment, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert not list(tmp_path.iterdir()), "importing wrote files"


def _definitions(tree: ast.Module) -> Iterator[tuple[str, Function | ast.ClassDef]]:
    """Public functions, classes and methods, with their dotted names."""
    scopes: list[tuple[str, ast.Module | ast.ClassDef]] = [("", tree)]
    while scopes:
        prefix, scope = scopes.pop()
        for node in scope.body:
            if isinstance(node, Function | ast.ClassDef) and not node.name.startswith("_"):
                yield prefix + node.name, node
                if isinstance(node, ast.ClassDef):
                    scopes.append((f"{prefix}{node.name}.", node))


@pytest.mark.parametrize("file", FILES, ids=_name)
def test_everything_public_is_documented(file: Path) -> None:
    tree = _tree(file)
    missing = [name for name, node in _definitions(tree) if not ast.get_docstring(node)]
    assert ast.get_docstring(tree), f"{_name(file)} has no docstring"
    assert not missing, f"{_name(file)}: no docstring: {missing}"


@pytest.mark.parametrize("file", FILES, ids=_name)
def test_every_function_is_annotated(file: Path) -> None:
    """All arguments and the result, also of private functions and methods; ``__init__`` needs no result."""
    incomplete = []
    for node in ast.walk(_tree(file)):
        if isinstance(node, Function):
            arguments = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
            arguments += [argument for argument in (node.args.vararg, node.args.kwarg) if argument]
            bare = [a.arg for a in arguments if a.annotation is None and a.arg not in ("self", "cls")]
            if bare or (node.returns is None and node.name != "__init__"):
                incomplete.append(f"{node.name}({', '.join(bare)})")
    assert not incomplete, f"{_name(file)}: {incomplete}"


@pytest.mark.parametrize("file", FILES, ids=_name)
def test_every_function_fits_a_screen(file: Path) -> None:
    sizes = {
        node.name: (node.end_lineno or 0) - node.lineno + 1
        for node in ast.walk(_tree(file))
        if isinstance(node, Function)
    }
    long = {name: lines for name, lines in sizes.items() if lines > MAX_FUNCTION_LINES}
    assert not long, f"{_name(file)}: functions longer than {MAX_FUNCTION_LINES} lines: {long}"


def _raises_again(handler: ast.ExceptHandler) -> bool:
    last = handler.body[-1]
    return isinstance(last, ast.Raise) and last.exc is None


@pytest.mark.parametrize("file", FILES, ids=_name)
def test_no_exception_is_caught_blindly(file: Path) -> None:
    """Except to tidy up and raise it again."""
    for node in ast.walk(_tree(file)):
        if isinstance(node, ast.ExceptHandler) and not _raises_again(node):
            caught = [n.id for n in ast.walk(node.type) if isinstance(n, ast.Name)] if node.type else ["everything"]
            blind = {"everything", "Exception", "BaseException"} & set(caught)
            assert not blind, f"{_name(file)}:{node.lineno} catches {blind}"


def test_no_file_is_called_after_nothing() -> None:
    """Nor like a module of the standard library, where that is importable by its bare name."""
    for file in FILES:
        assert file.stem not in FORBIDDEN_NAMES, _name(file)
        if file.parent.name in ("scripts", "tools"):
            assert file.stem not in sys.stdlib_module_names, _name(file)
