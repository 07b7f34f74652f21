"""The READMEs tell the truth: commands run (small, or dry where they launch), names exist, call trees are real."""

from __future__ import annotations

import ast
import json
import re
import shlex
import sys
from collections.abc import Callable, Iterator
from functools import cache
from itertools import groupby
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest

import glus.config
from glus.__main__ import COMMANDS as PROGRAMS
from glus.config.overrides import check_overrides
from glus.pictures import write_movie
from tests.programs import ROOT, run

FRONT = ROOT / "README.md"
FOLDERS = ("configs", "scripts", "tools", "tests", "glus", "assets/glus_shapes", "assets/glus_towers")
READMES = (FRONT, *(ROOT / folder / "README.md" for folder in FOLDERS))
GIVEN = ROOT / "tests" / "parity" / "recorded"
"""Its README came with the recorded numbers."""
MAX_LINES, MAX_WORDS, MAX_GLOSSARY = 150, 900, 25

TINY = {
    "tools/make_shapes.py": ["--train-videos", "3", "--valid-videos", "2", "--num-frames", "8"],
    "tools/pretrain_towers.py": ["num_scenes=3", "num_frames=8", "clip_steps=1", "sam2_steps=1", "llm_steps=1",
                               "clip_batch_size=2", "llm_batch_size=2"],
    "scripts/train.py": ["trainer.steps=1", "trainer.global_batch_size=1", "trainer.micro_batch_size=1",
                         "trainer.eval_max_videos=1", "data.num_workers=0"],
    "scripts/predict.py": [],
    "scripts/score_frames.py": [],
    "scripts/score.py": [],
    "scripts/compare.py": [],
    "scripts/report.py": ["num_sentences=1"],
    "scripts/show.py": ["max_videos=1", "num_expressions=1"],
    "scripts/segment_video.py": [],
    "tools/export.py": [],
    "tools/plan.py": [],
    "tools/check_backbone.py": [],
    "tools/calibrate_existence.py": [],
    "tools/check_data.py": [],
    "tools/doctor.py": [],
    "scripts/submit.py": [],
}  # fmt: skip
"""Program -> what makes its command small."""
COMPOSED = ("glus_s", "glus_a", "mevis_valid_u", "mevis_valid")
"""Commands that name these need data nobody can download here: their configuration is composed, nothing is run."""
NOT_OURS = ("hf download ", "curl ", "source ")
"""Downloads, and the shell's own."""
DOWNLOADED = "Swindl/"
"""Commands that name it download a model: their options are looked up, nothing is run."""
RUN_ELSEWHERE = {
    "scripts/ablate.py": "tests/test_ablate.py",
    "scripts/demo.py": "tests/inference/test_demo.py",
    "tools/check_parity.py": "tests/parity/test_recorded.py",
    "tools/qualify.py": "tests/test_qualify.py",
    "tools/convert_weights.py": "tests/test_convert_weights.py",
    "tools/benchmark_scoring.py": "tests/evaluation/test_benchmark_scoring.py",
    "tools/benchmark_inference.py": "tests/inference/test_benchmark.py",
    "tools/benchmark_training.py": "tests/test_benchmark_training.py",
}
"""Program that takes minutes, or a checkpoint -> the tests that run what its commands run."""
ALONE = ("scripts/train.py", "tools/doctor.py")
"""Programs that need a process of their own: a process group begins once, and the doctor may find fault."""
RUNNER = """
import json, os, runpy, sys

for program, *arguments in json.loads(sys.argv[1]):
    print("==", program, *arguments, flush=True)
    print("==", program, *arguments, file=sys.stderr, flush=True)
    sys.argv[:], sys.path[0] = [program, *arguments], os.path.dirname(program)
    try:
        runpy.run_path(program, run_name="__main__")
    except SystemExit as end:
        if end.code:
            raise
"""
"""Runs programs one after another in one process: the seconds that a new one takes to import are most of theirs."""
CALLED_BY_INSTANCE = ("__call__", "__getitem__", "forward")
"""Methods that nobody calls by their names."""


# -------------------------------------------------------------------------------------------------- what they say


def blocks(readme: Path, language: str) -> list[str]:
    """What stands in the fenced blocks of a language; "" for those without one."""
    fences = re.findall(r"^```(\w*)\n(.*?)^```", readme.read_text(), flags=re.DOTALL | re.MULTILINE)
    return [block for name, block in fences if name == language]


def commands(*readmes: Path) -> list[str]:
    """Lines of all bash blocks, each once."""
    lines = [line for readme in readmes or READMES for block in blocks(readme, "bash") for line in block.splitlines()]
    return list(dict.fromkeys(line for line in lines if line.strip() and not line.startswith(NOT_OURS)))


def program(command: str) -> str:
    """The script of a command, such as scripts/train.py, also where it is called by ``glus train``."""
    words = shlex.split(command)
    return PROGRAMS[words[1]] if words[0] == "glus" else next(word for word in words if word.endswith((".py", ".sh")))


def arguments(command: str) -> list[str]:
    """What follows the script."""
    words = shlex.split(command)
    return words[2:] if words[0] == "glus" else words[words.index(program(command)) + 1 :]


def is_composed(command: str) -> bool:
    """Whether the command is for data and weights that nobody can download here."""
    return any(re.search(rf"\b{name}\b", command) for name in COMPOSED)


def check(command: list[str], folder: Path) -> None:
    """Run it."""
    done = run(*command, folder=folder, HF_HUB_OFFLINE="1", HYDRA_FULL_ERROR="1")
    as_it_should = done.returncode == 0
    if "tools/doctor.py" in command[-1]:  # which may find fault with this machine
        as_it_should = re.search(r"\d+ (checks passed|of \d+ checks failed)", done.stdout) is not None
    assert as_it_should, f"{shlex.join(command)}\n{done.stdout[-1500:]}\n{done.stderr[-3000:]}"


def check_programs(wanted: list[str], folder: Path, added: Callable[[str], list[str]]) -> None:
    """Run Python programs in one process, each with what is ``added`` for it."""
    words = [[str(ROOT / program(command)), *arguments(command), *added(program(command))] for command in wanted]
    check([sys.executable, "-c", RUNNER, json.dumps(words)], folder)


# -------------------------------------------------------------------------------------------------- as a whole


def test_every_readme_is_read() -> None:
    tops = [*(folder.split("/")[0] for folder in FOLDERS), ".ci"]
    found = {FRONT, *(readme for top in dict.fromkeys(tops) for readme in (ROOT / top).rglob("README.md"))}
    assert found == {*READMES, GIVEN / "README.md"}


def test_the_front_page_is_short() -> None:
    text = FRONT.read_text()
    assert len(text.splitlines()) <= MAX_LINES
    assert len(text.split()) <= MAX_WORDS


def test_the_front_page_installs_before_it_runs_anything() -> None:
    """B12."""
    lines = commands_and_downloads(FRONT)
    assert lines[:2] == ["bash scripts/install.sh", "source .venv/bin/activate"]


def commands_and_downloads(readme: Path) -> list[str]:
    """All lines of its bash blocks."""
    return [line for block in blocks(readme, "bash") for line in block.splitlines() if line.strip()]


def test_every_program_is_known() -> None:
    assert "bash scripts/quickstart.sh" in commands(FRONT)
    assert "bash scripts/test.sh" in commands(FRONT)
    for command in commands():
        assert (ROOT / program(command)).is_file(), command
        assert program(command).endswith(".sh") or program(command) in (*TINY, *RUN_ELSEWHERE), command


def test_ci_runs_the_test_command() -> None:
    assert "bash scripts/test.sh" in (ROOT / ".ci" / "run").read_text().splitlines()


def test_every_program_has_a_row() -> None:
    """In the table of its folder's README; a launcher or a pair may share one, as ``a_{b,c}.sh``."""
    for folder in ("scripts", "tools"):
        readme = ROOT / folder / "README.md"
        rows = [line.split("|")[1] for line in readme.read_text().splitlines() if line.startswith("| `")]
        named = {name for row in rows for word in re.findall(r"`([^`]+)`", row) for name in spelled_out(word)}
        programs = {path.name for path in (ROOT / folder).iterdir() if path.suffix in (".py", ".sh")}
        assert programs - named <= {"reproduce.sh"}, readme  # which the two others call


def spelled_out(word: str) -> list[str]:
    """``a_{b,c}.sh`` -> a_b.sh, a_c.sh."""
    braces = re.fullmatch(r"(.*)\{(.*)\}(.*)", word)
    return [braces[1] + one + braces[3] for one in braces[2].split(",")] if braces else [word]


# -------------------------------------------------------------------------------------------------- commands


@pytest.mark.parametrize("script", sorted(path.name for path in (ROOT / "scripts").glob("*.sh")))
def test_shell_scripts_parse(script: str) -> None:
    check(["bash", "-n", str(ROOT / "scripts" / script)], ROOT)


@pytest.mark.parametrize("command", [c for c in commands() if program(c).endswith(".sh")])
def test_shell_scripts_know_their_variables(command: str) -> None:
    sources = [path.read_text() for path in (ROOT / "scripts").glob("*.sh")]
    for name in re.findall(r"\b([A-Z_]+)=", command):
        assert any(name in source for source in sources), f"{command}: no script reads {name}"


@pytest.mark.parametrize("command", [c for c in commands() if program(c) in RUN_ELSEWHERE])
def test_options_of_commands_that_are_run_elsewhere_exist(command: str) -> None:
    assert (ROOT / RUN_ELSEWHERE[program(command)]).is_file()
    source = "".join(path.read_text() for folder in ("scripts", "tools") for path in (ROOT / folder).rglob("*.py"))
    for option in (word for word in arguments(command) if word.startswith("--")):
        assert f'"{option}"' in source, command


@pytest.mark.parametrize("name", sorted({program(c) for c in commands() if program(c).endswith(".py")}))
def test_programs_find_what_lies_beside_them(name: str) -> None:
    """Not only in tests, where the root is on the path: scripts and tools are not installed."""
    source = (ROOT / name).read_text()
    needs_root = re.search(r"^(from|import) (tools|scripts)\b", source, re.MULTILINE) is not None
    assert not needs_root or "if not __package__:" in source, f"{name}: sees no tools/ where it is run by its path"


def test_full_size_commands_compose(tmp_path: Path) -> None:
    full = [command for command in commands() if is_composed(command) and program(command) in TINY]
    check_programs(full, tmp_path, lambda _: ["--cfg", "job", "--resolve"])


def examples(name: str) -> list[str]:
    """The commands in a program's docstring, those over several lines put together."""
    text = (ast.get_docstring(ast.parse((ROOT / name).read_text())) or "").replace("\\\n", " ")
    return [line.split("#")[0].strip() for line in text.splitlines() if line.startswith("    ") and name in line]


@pytest.mark.parametrize("name", sorted(set(PROGRAMS.values())))
def test_examples_in_docstrings_start_from_what_readmes_make(name: str) -> None:
    """B11. Their keys and options exist, and their inputs are what a command of a README writes."""
    source, made = (ROOT / name).read_text(), " ".join(commands())
    jobs = re.search(r"Jobs\(\"(\w+)\", (\w+)", source)
    for command in examples(name):
        words = [word for word in shlex.split(command.split(name, 1)[1]) if "..." not in word]
        if jobs:
            check_overrides(jobs[1], getattr(glus.config, jobs[2]), words)
        assert all(f'"{word}"' in source for word in words if word.startswith("--")), command
        for place in re.findall(r"(?:weights|predictions)[= ]+(outputs/[^\s\]},]+)", command):
            assert place in made, f"{command}: no README makes {place}"


@pytest.mark.parametrize("command", [c for c in commands() if "/launch_" in c])
def test_launchers_run_dry(command: str, tmp_path: Path) -> None:
    check(["bash", "-c", f"DRY_RUN=1 {command.replace('scripts/launch', str(ROOT / 'scripts/launch'))}"], tmp_path)


def test_small_commands_run_in_order(tmp_path: Path) -> None:
    """The others, as a user would run them one after another, in an empty folder."""
    (tmp_path / "assets").symlink_to(ROOT / "assets")
    frames = np.random.default_rng(0).integers(0, 255, (3, 48, 64, 3), dtype=np.uint8)
    write_movie(tmp_path / "my_video.mp4", frames, frames_per_second=3)
    small = [c for c in commands() if program(c) in TINY and not is_composed(c) and DOWNLOADED not in c]
    order = ["make_shapes", "pretrain_towers", "experiment=shapes"]  # what the others need
    small.sort(key=lambda c: next((i for i, name in enumerate(order) if name in c), len(order)))
    for block in (block for readme in READMES for block in blocks(readme, "python")):
        check([sys.executable, "-c", block], tmp_path)
    for is_alone, together in groupby(small, lambda command: program(command) in ALONE):
        for group in [[command] for command in together] if is_alone else [list(together)]:
            check_programs(group, tmp_path, TINY.__getitem__)
    assert (tmp_path / "outputs" / "shapes" / "comparison.json").is_file()
    for folder in ("my_video", "in_python"):
        assert (tmp_path / "outputs" / folder / "segmentation.json").is_file()


@pytest.mark.parametrize("command", [c for c in commands() if DOWNLOADED in c and program(c) in TINY])
def test_options_of_commands_that_download_exist(command: str) -> None:
    source = (ROOT / program(command)).read_text()
    assert all(f'"{option}"' in source for option in arguments(command) if option.startswith("--"))


def test_downloads_are_those_that_configs_look_for() -> None:
    """Starting weights come to where ``configs/model/glus_7b.yaml`` and its READMEs say that they lie."""
    config = (ROOT / "configs" / "model" / "glus_7b.yaml").read_text()
    lines = [line for block in blocks(FRONT, "bash") for line in block.splitlines() if line.startswith(NOT_OURS[:2])]
    targets = [word for line in lines for word in shlex.split(line) if word.startswith("weights/")]
    assert len(targets) == 3
    for target in targets:
        assert Path(target).name in config, target


# -------------------------------------------------------------------------------------------------- names


def anchors(readme: Path) -> set[str]:
    """Of the headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.+)$", readme.read_text(), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("readme", READMES, ids=lambda path: path.parent.name)
def test_links_lead_somewhere(readme: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", readme.read_text()):
        if not target.startswith("https://"):
            name, _, anchor = target.partition("#")
            file = readme.parent / name if name else readme
            assert file.exists(), f"{readme}: {target}"
            assert not anchor or anchor in anchors(file), f"{readme}: {target}"


@pytest.mark.parametrize("readme", READMES, ids=lambda path: path.parent.name)
def test_files_that_are_named_exist(readme: Path) -> None:
    """From the root, from the README's folder, or a bare name somewhere below that."""
    for word in re.findall(r"`([\w./*{},-]+\.(?:py|sh|yaml))`", readme.read_text()):
        for name in spelled_out(word):
            found = [*ROOT.glob(name), *readme.parent.glob(name)] or readme.parent.rglob(name)
            assert any(found), f"{readme}: {name}"


class Line(NamedTuple):
    """Of a call tree."""

    depth: int
    name: str
    file: Path


def trees(readme: Path) -> Iterator[list[Line]]:
    """The call trees: lines of indented names, each with its file."""
    for block in blocks(readme, ""):
        found = [re.fullmatch(r"( *)(\S+) +(\S+\.py)(?: .*)?", line) for line in block.splitlines()]
        if any(found):
            assert all(found), f"not a line of a call tree:\n{block}"
            yield [Line(len(m[1]), m[2], _file(readme, m[3])) for m in found if m]


def _file(readme: Path, name: str) -> Path:
    return ROOT / name if name.startswith("scripts/") else readme.parent / name


@cache
def definition(name: str, file: Path) -> str | None:
    """The source of a function, class, method (``Class.method``) or constant of a file."""
    text = file.read_text()
    scope: ast.AST = ast.parse(text)
    for piece in name.split("."):
        inside = [node for node in ast.iter_child_nodes(scope) if piece in _defined(node)]
        if not inside:
            return None
        scope = inside[0]
    return ast.get_source_segment(text, scope)


def _defined(node: ast.AST) -> list[str]:
    if isinstance(node, ast.FunctionDef | ast.ClassDef):
        return [node.name]
    targets = node.targets if isinstance(node, ast.Assign) else [node.target] if isinstance(node, ast.AnnAssign) else []
    return [target.id for target in targets if isinstance(target, ast.Name)]


def test_call_trees_are_those_of_the_code() -> None:
    """Each name is defined where the tree says, and named in the code of its parent."""
    found = list(trees(ROOT / "glus" / "README.md"))
    assert len(found) >= 3
    for tree in found:
        parents: list[Line] = []
        for line in tree:
            parents = [parent for parent in parents if parent.depth < line.depth]
            assert definition(line.name, line.file), f"{line.file} has no {line.name}"
            called = line.name.rpartition(".")[2]
            if parents and called not in CALLED_BY_INSTANCE:
                source = definition(parents[-1].name, parents[-1].file) or ""
                assert re.search(rf"\b{called}\b", source), f"{parents[-1].name} does not name {line.name}"
            parents.append(line)


def test_a_false_call_tree_is_noticed() -> None:
    file = ROOT / "glus" / "models" / "glus.py"
    assert definition("Glus.forward", file)
    assert definition("Glus.backward", file) is None
    assert "decode_clip" not in (definition("Glus.answer", file) or "decode_clip")


def test_the_glossary_is_short() -> None:
    section = (ROOT / "glus" / "README.md").read_text().partition("\n## Glossary\n")[2].partition("\n## ")[0]
    words = [line for line in section.splitlines() if line.startswith("| ")][1:]
    assert 0 < len(words) <= MAX_GLOSSARY


def test_packages_and_letters_are_those_of_the_code() -> None:
    """Every package of the library has a row, and every letter of ``batch.py``'s legend stands in the README."""
    text = (ROOT / "glus" / "README.md").read_text()
    packages = {path.parent for path in (ROOT / "glus").rglob("__init__.py")} - {ROOT / "glus"}
    for package in packages:
        assert f"| `{package.relative_to(ROOT / 'glus').as_posix()}/` |" in text
    letters = set(re.findall(r"^``(\w(?: \w)?)``", (ROOT / "glus" / "batch.py").read_text(), flags=re.MULTILINE))
    section = text.partition("\n## Shape letters\n")[2].partition("\n## ")[0]
    assert {letter for pair in letters for letter in pair.split()} <= set(re.findall(r"`(\w)`", section))
