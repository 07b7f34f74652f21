"""The rules of the house, read from the source: layers, borders to other libraries, documentation, size."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
LAYERS = (
    {"config", "types", "batch", "tokens", "files", "distributed", "log", "console", "compat"}
    | {"pictures", "painter", "fonts"},
    {"data", "models", "losses"},
    {"train", "inference", "evaluation", "shapes"},
    {"__main__"},
)
"""Modules and packages of ``glus``, the lowest layer first; with the last, ``scripts`` and ``tools`` may import all."""
BORDERS = {
    "sam2": "glus/models/segmenter/sam2.py",
    "deepspeed": "glus/train/engine.py",
    "wandb": "glus/log.py",
    "av": "glus/data/video_decoder.py",
    "decord": "glus/data/video_file.py",
    "bitsandbytes": "glus/models/mllm/adapters.py",
}
"""Libraries that one file alone imports."""
LLAVA, SAM2 = "glus/models/mllm/llava.py", "glus/models/segmenter/sam2.py"
INTERNVL, QWEN3_VL = "glus/models/mllm/internvl.py", "glus/models/mllm/qwen3_vl.py"
QWEN2_5_VL = "glus/models/mllm/qwen2_5_vl.py"
REFERENCES = "tools/parity/references.py"
FAMILIES = {
    LLAVA: {
        "glus/models/build.py",  # puts the network together
        "glus/models/release_layout.py",  # the names of its tensors in other people's checkpoints
        "glus/shapes/pretrain.py",  # trains the small towers of the shipped model
        "tools/pretrain_towers.py",
        *("tools/benchmarks/plain.py", "tools/parity/network.py"),  # measure and compare its insides
    },
    INTERNVL: {"glus/models/build.py"},
    QWEN3_VL: {"glus/models/build.py", QWEN2_5_VL},
    QWEN2_5_VL: {"glus/models/build.py"},
    SAM2: {
        *("glus/models/build.py", "glus/shapes/pretrain.py"),
        *("tools/benchmarks/plain.py", "tools/parity/network.py"),
    },
}
"""The file of each family -> who may import it. Everything else knows ``Mllm`` and ``Segmenter``."""
FAMILY_CLASSES = {
    "CLIP": {LLAVA, "glus/models/release.py", REFERENCES},
    "Llama": {LLAVA, "glus/models/release.py"},  # what a released folder says of its architecture
    "InternVL": {INTERNVL},
    "Qwen3VL": {QWEN3_VL},
    "Qwen2_5_VL": {QWEN2_5_VL},
}
"""Beginnings of the names of transformers' classes -> who may import these."""
DEFINED_OFTEN = {"main", "parse_arguments", "log"}
"""What a program or a module has under the same name as its neighbours: entry point, command line, logger."""
SAME_FILE_NAMES = {"llava.py"}
"""A family's chat grammar and its network. Programs may be called like the module that they run."""
FORBIDDEN_NAMES = {"utils", "util", "misc", "helper", "helpers", "common"}
MAX_FUNCTION_LINES = 60

GLUS_FILES = sorted((ROOT / "glus").rglob("*.py"))
FILES = [*GLUS_FILES, *sorted((ROOT / "scripts").rglob("*.py")), *sorted((ROOT / "tools").rglob("*.py"))]
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
        # Only what its functions need, which test_import_glus_is_light shows to be loaded late.
        functions = {f"glus.inference.segment.{name}" for name in ("load", "segment", "stream")}
        assert {name for name in _imports(file) if _part(name)} == functions | {"glus.inference.segment"}
        return
    for part in {_part(name) for name in _imports(file)} - {None, own}:
        assert part is not None
        is_down = _layer(part) < _layer(own)
        assert is_down or _layer(part) == _layer(own) == 0, f"{_name(file)} imports glus.{part}"


def test_every_part_has_a_layer() -> None:
    parts = {file.relative_to(ROOT / "glus").with_suffix("").parts[0] for file in GLUS_FILES} - {"__init__"}
    assert parts == set().union(*LAYERS)


def _modules() -> dict[str, Path]:
    """Dotted name of every module of the project -> its file."""
    return {".".join(f.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): f for f in FILES}


def _imported_modules(file: Path, modules: dict[str, Path]) -> set[str]:
    """Those of ``modules`` that a file imports, also inside functions and for types alone."""
    return {name if name in modules else name.rpartition(".")[0] for name in _imports(file)} & modules.keys()


def test_no_module_imports_itself_by_way_of_others() -> None:
    """Not even for its types: two modules that need each other are one, or hide a third."""
    modules = _modules()
    needs = {name: _imported_modules(file, modules) - {name} for name, file in modules.items()}
    while needs:
        free = [name for name, others in needs.items() if not others & needs.keys()]
        assert free, f"import each other, or need some that do: {sorted(needs)}"
        for name in free:
            del needs[name]


def test_scoring_and_checking_data_load_neither_models_nor_torch() -> None:
    """Also not by way of other modules: each of its processes starts in a second, and needs no GPU."""
    modules = [".".join(f.relative_to(ROOT).with_suffix("").parts) for f in (ROOT / "glus/evaluation").rglob("*.py")]
    code = f"""
import importlib, runpy, sys
for name in {[*modules, "glus.data.check"]!r}:
    importlib.import_module(name)
for script in ("score", "submit", "compare"):
    runpy.run_path(f"scripts/{{script}}.py")
assert {{"glus.evaluation.score", "glus.data.predictions"}} <= set(sys.modules)
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


@pytest.mark.parametrize(("home", "users"), FAMILIES.items())
def test_few_know_the_file_of_a_family(home: str, users: set[str]) -> None:
    modules = _modules()
    family = home.removesuffix(".py").replace("/", ".")
    assert {_name(file) for file in FILES if family in _imported_modules(file, modules)} == users


@pytest.mark.parametrize(("prefix", "users"), FAMILY_CLASSES.items())
def test_few_name_the_classes_of_a_family(prefix: str, users: set[str]) -> None:
    found = set()
    for file in FILES:
        pieces = [name.split(".") for name in _imports(file)]
        if any(name[0] == "transformers" and name[-1].startswith(prefix) for name in pieces):
            found.add(_name(file))
    assert found == users


def test_hydra_stays_at_the_entry() -> None:
    users = {_name(file) for file in GLUS_FILES if any(name.split(".")[0] == "hydra" for name in _imports(file))}
    assert users == {"glus/models/segmenter/sam2.py", "glus/config/jobs.py"}


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


def _public_names(tree: ast.Module) -> Iterator[str]:
    """Functions, classes and constants of a module; type variables are words of its signatures, no names of its own."""
    for node in tree.body:
        if isinstance(node, Function | ast.ClassDef):
            yield node.name
        elif isinstance(node, ast.Assign | ast.AnnAssign) and node.value is not None:
            called = node.value.func if isinstance(node.value, ast.Call) else None
            if not (isinstance(called, ast.Name) and called.id in ("TypeVar", "ParamSpec")):
                targets = node.targets if isinstance(node, ast.Assign) else [node.target]
                names = (name for target in targets for name in ast.walk(target))
                yield from (name.id for name in names if isinstance(name, ast.Name))


def test_a_public_name_is_defined_once() -> None:
    """So that a search for it ends where it is defined, and one word means one thing."""
    homes: dict[str, set[str]] = defaultdict(set)
    for file in FILES:
        for name in _public_names(_tree(file)):
            if not name.startswith("_"):
                homes[name].add(_name(file))
    often = {name: sorted(files) for name, files in homes.items() if len(files) > 1}
    assert often.keys() == DEFINED_OFTEN, {name: files for name, files in often.items() if name not in DEFINED_OFTEN}


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


def test_file_names_are_unique() -> None:
    homes: dict[str, set[str]] = defaultdict(set)
    for file in FILES:
        is_program = file.parent.name in ("scripts", "tools")
        if file.stem != "__init__" and not is_program:
            homes[file.name].add(_name(file))
    assert {name for name, files in homes.items() if len(files) > 1} == SAME_FILE_NAMES
    programs = [file.name for file in FILES if file.parent.name in ("scripts", "tools")]
    assert len(programs) == len(set(programs))
