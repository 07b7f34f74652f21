"""``glus``, the command: all programs under one name, from any folder, also from an installed wheel."""

import subprocess
import sys

import pytest

from glus.__main__ import COMMANDS, help_text
from tests.programs import ROOT, environment, run


def glus(*words, folder=None, **variables):
    return run(sys.executable, "-m", "glus", *words, folder=folder, **variables)


def test_every_program_has_a_line_of_help():
    lines = help_text().splitlines()[2:-2]
    assert [line.split("  ")[1].strip() for line in lines] == list(COMMANDS)
    assert all(line.endswith((".", "?")) for line in lines)
    assert all((ROOT / file).is_file() for file in COMMANDS.values())


def test_help_waits_for_no_library():
    loaded = "import sys, glus.__main__ as m; m.main(['--help']); print(*sys.modules)"
    modules = run(sys.executable, "-c", loaded).stdout.split()
    assert "glus.files" in modules
    assert not {"torch", "numpy", "hydra", "omegaconf", "transformers"} & set(modules)


def test_importing_glus_loads_nothing_but_what_python_brings():
    """What takes time comes with the first function that is asked for."""
    names = "{name.split('.')[0] for name in sys.modules}"
    loaded = f"import sys; before = {names}; import glus; print(*{names} - before - set(sys.stdlib_module_names))"
    assert run(sys.executable, "-c", loaded).stdout.split() == ["glus"]
    assert "predictor" in run(sys.executable, "-c", "import glus; print(glus.load.__doc__)").stdout


@pytest.mark.parametrize(
    ("words", "meant"),
    [
        (["scor"], "did you mean score"),
        (["shapes"], "did you mean data shapes?"),
        (["data"], "did you mean data shapes, data check, data davis17?"),
        (["data", "chekc"], "data check"),
        (["xyzzy"], "no command 'xyzzy'; glus --help lists them"),
    ],
)
def test_an_unknown_command_says_which_are_near(words, meant):
    done = glus(*words)
    assert done.returncode == 1
    assert meant in done.stderr


def test_a_command_is_its_program_in_any_folder(tmp_path):
    done = glus("data", "shapes", "s", "--train-videos", "1", "--valid-videos", "1", folder=tmp_path)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "s" / "valid").is_dir()
    assert glus("score", "dataset=shapes_valid", "predictions=none", "dataset.root=s", folder=tmp_path).returncode == 1
    assert "--video" in glus("segment", "--help").stdout
    assert "no_such_key" in glus("train", "no_such_key=1", folder=tmp_path).stderr


@pytest.mark.slow
def test_an_installed_wheel_does_it_all(tmp_path):
    """Packed as for an index, unpacked where nothing else of the project is."""
    package, work = tmp_path / "package", tmp_path / "work"
    pip = [sys.executable, "-m", "pip"]
    for words in (
        ["wheel", "--no-deps", "--no-build-isolation", "-w", tmp_path, ROOT],
        ["install", "--no-deps", "--target", package],
    ):
        files = sorted(tmp_path.glob("*.whl"))
        subprocess.run([*pip, *map(str, words), *map(str, files)], check=True, env=environment(), capture_output=True)
    work.mkdir()

    def program(*words):
        done = glus(*words, folder=work, PYTHONPATH=str(package))
        assert done.returncode == 0, done.stderr
        return done.stdout

    sample = ("--video", str(package / "glus" / "assets" / "example.mp4"), "--text", "the star that turns red")
    assert "found in 16 of 16" in program("segment", *sample, "--weights", "glus_shapes", "--output", "outputs/sample")
    program("data", "shapes", "data/shapes", "--train-videos", "4", "--valid-videos", "2")
    few = ("trainer.steps=20", "trainer.global_batch_size=1", "trainer.micro_batch_size=1")
    program("train", "experiment=shapes", "valid=null", *few)
    program("predict", "dataset=shapes_valid", "weights=outputs/shapes", "output=outputs/predicted")
    assert "appearance" in program("score", "dataset=shapes_valid", "predictions=outputs/predicted")
    program("report", "runs=[outputs/predicted]", "output=outputs/report.html", "num_sentences=1")
    assert (work / "outputs" / "report.html").is_file()
