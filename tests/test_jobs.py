"""The entry of programs: jobs of a sweep, their outputs, ``~``, and terminals that show little."""

from __future__ import annotations

import argparse
import io
import logging
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import OmegaConf

from glus.config import CheckConfig, ScoreConfig, load_config
from glus.config.jobs import Jobs, escape_output, user_path


@dataclass
class Config:
    """Of a program that writes to ``output``."""

    output: str = "out"
    name: str = ""


def status_of(jobs: Jobs, configs: list[object], task: Callable[..., int | None]) -> int | str | None:
    """Exit status of a program that is called with these configs; an exception is one that cannot be read."""

    def compose() -> None:
        for config in configs:
            with jobs.telling():
                if isinstance(config, Exception):
                    raise config
                jobs.add(config)

    with pytest.raises(SystemExit) as end:
        jobs.run(compose, task)
    return end.value.code


@pytest.fixture(autouse=True)
def in_an_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["program"])
    monkeypatch.setattr(logging.getLogger(), "handlers", logging.getLogger().handlers[:])


def test_every_job_is_run_whatever_becomes_of_the_others(capsys: pytest.CaptureFixture[str]) -> None:
    done = []

    def task(config: Config) -> int | None:
        done.append(config.output)
        if config.name == "broken":
            raise ValueError(f"{config.output} is broken")
        return 1 if config.name == "bad" else None

    good = [Config("a"), Config("b"), Config("c")]
    assert status_of(Jobs("score", Config, "output"), good, task) == 0
    for name in ("broken", "bad"):
        done.clear()
        assert status_of(Jobs("score", Config, "output"), [Config("a"), Config("b", name), Config("c")], task) == 1
        assert done == ["a", "b", "c"]
    done.clear()
    assert status_of(Jobs("score", Config, "output"), [ValueError("no such key"), Config("b")], task) == 1
    assert done == ["b"]
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error")]
    assert errors == ["error: b is broken", "error: no such key"]


def test_an_error_that_nobody_foresaw_comes_after_the_last_job(caplog: pytest.LogCaptureFixture) -> None:
    """Such as one of a GPU whose memory is full: the next job may need less."""
    done = []

    def task(config: Config) -> None:
        done.append(config.name)
        if config.name != "c":
            raise RuntimeError(f"out of memory in {config.name}")

    jobs = Jobs("score", Config, "output")
    with pytest.raises(RuntimeError, match="out of memory in b"):
        jobs.run(lambda: [jobs.add(Config(name, name)) for name in "abc"], task)
    assert done == ["a", "b", "c"]
    assert "out of memory in a" in caplog.text


def test_a_job_that_leaves_the_program_ends_the_sweep() -> None:
    def task(config: Config) -> None:
        done.append(config.output)
        sys.exit(75)

    done: list[str] = []
    assert status_of(Jobs("score", Config, "output"), [Config("a"), Config("b")], task) == 75
    assert done == ["a"]


@pytest.mark.parametrize("is_file", [False, True])
def test_outputs_that_jobs_would_share_are_parted(is_file: bool) -> None:
    found: list[str] = []
    configs = [Config("x/y"), Config("z"), Config("./x//y"), ValueError("not read"), Config("x/y")]
    status_of(Jobs("score", Config, "output", is_file), configs, lambda config: found.append(config.output))
    parted = [f"x/{number}/y" if is_file else f"x/y/{number}" for number in (0, 2, 4)]
    assert found == [parted[0], "z", *parted[1:]]
    found.clear()
    status_of(Jobs("score", Config, "output", is_file), [Config("x/y")], lambda config: found.append(config.output))
    status_of(Jobs("score", Config), [object(), object()], lambda config: found.append("writes nothing"))
    assert found == ["x/y", "writes nothing", "writes nothing"]


def test_several_splits_are_jobs_that_are_called_by_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each writes, and reads, below the name of its split; in the end all are told together, with those that failed."""

    @dataclass
    class Scored:
        predictions: str = "p"
        output: str = "p"
        dataset: str = ""

    monkeypatch.setattr(sys, "argv", ["program", "dataset=[mevis_valid_u, revos_valid]", "num_workers=1"])
    jobs, told = Jobs("score", ScoreConfig, "output", reads="predictions"), []

    def compose() -> None:
        assert sys.argv[1:] == ["dataset=mevis_valid_u,revos_valid", "hydra.mode=MULTIRUN", "num_workers=1"]
        Path("multirun.yaml").touch()
        for name in ("mevis_valid_u", "revos_valid"):
            with jobs.telling():
                jobs.add(Scored(dataset=name))

    def task(config: Scored) -> None:
        if config.dataset == "revos_valid":
            raise ValueError("it is damaged")

    with pytest.raises(SystemExit) as end:
        jobs.run(compose, task, lambda configs, finished: told.extend([configs, list(finished)]))
    assert end.value.code == 1
    configs, finished = told
    assert {name: (config.predictions, config.output) for name, config in configs.items()} == {
        "mevis_valid_u": ("p/mevis_valid_u", "p/mevis_valid_u"),
        "revos_valid": ("p/revos_valid", "p/revos_valid"),
    }
    assert finished == ["mevis_valid_u"]
    assert not Path("multirun.yaml").exists()


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("dataset=[mevis_valid_u,mevis_valid_u]", "expected each split once"),
        ("dataset=[mevis_valid_u,mevis_vaild]", "dataset=mevis_vaild: did you mean mevis_valid"),
    ],
)
def test_splits_that_cannot_be_are_refused(monkeypatch: pytest.MonkeyPatch, override: str, message: str) -> None:
    monkeypatch.setattr(sys, "argv", ["program", override])
    with pytest.raises(SystemExit, match=message):
        Jobs("score", ScoreConfig).run(lambda: None, lambda config: None)


def test_a_split_has_its_own_place_also_where_the_others_cannot_be_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["program", "dataset=[mevis_valid_u,revos_valid]"])
    found: list[str] = []
    configs = [ValueError("no root"), Config("p")]
    assert status_of(Jobs("score", ScoreConfig, "output"), configs, lambda config: found.append(config.output)) == 1
    assert found == ["p/revos_valid"]


def test_several_splits_are_the_only_sweep(monkeypatch: pytest.MonkeyPatch) -> None:
    """``dataset=[a,b] num_workers=1,2`` would make four jobs, which two names cannot tell apart."""
    monkeypatch.setattr(sys, "argv", ["program", "dataset=[mevis_valid_u,revos_valid]", "num_workers=1,2"])
    message = status_of(Jobs("score", ScoreConfig, "output"), [Config() for _ in range(4)], pytest.fail)
    assert message == "error: dataset=[mevis_valid_u,revos_valid]: expected no other sweep beside it"


def test_what_cannot_be_written_ends_a_job_before_it_begins(capsys: pytest.CaptureFixture[str]) -> None:
    Path("file").touch()
    done: list[str] = []
    assert (
        status_of(
            Jobs("score", Config, "output"), [Config("file/x"), Config("y")], lambda config: done.append(config.output)
        )
        == 1
    )
    assert done == ["y"]
    assert capsys.readouterr().err.startswith("error: cannot write file/x: Not a directory")


def test_jobs_run_where_hydra_put_them(tmp_path: Path) -> None:
    """``hydra.job.chdir`` and ``hydra.job.env_set``."""
    jobs, found = Jobs("score", Config, "output"), []

    def compose() -> None:
        for name in "ab":
            (tmp_path / name).mkdir()
            os.chdir(tmp_path / name)
            os.environ["OF_A_JOB"] = name
            jobs.add(Config())
            os.chdir(tmp_path)
            del os.environ["OF_A_JOB"]

    with pytest.raises(SystemExit):
        jobs.run(compose, lambda config: found.append((Path.cwd().name, os.environ["OF_A_JOB"], config.output)))
    assert found == [("a", "a", "out"), ("b", "b", "out")]


def test_a_tilde_is_the_home_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/me")

    @dataclass
    class Paths:
        """All kinds of fields."""

        check: CheckConfig = field(default_factory=CheckConfig)
        several: dict[str, str] = field(default_factory=dict)

    content = {
        "check": {
            "dataset": {"name": "~d", "layout": "mevis", "root": "${check.paths.data}/mevis", "split": "a~b"},
            "paths": {"data": "~/data", "outputs": "~"},
            "against": ["~/x", "~y"],
            "output": "${check.paths.outputs}/a~/b",
        },
        "several": {"a": "~/a", "b": "/~/b"},
    }
    config = load_config(Paths, OmegaConf.create(content))
    assert (config.check.dataset.name, config.check.dataset.root) == ("~d", "/home/me/data/mevis")
    assert (config.check.paths.outputs, config.check.output) == ("/home/me", "/home/me/a~/b")
    assert config.check.against == ["/home/me/x", "~y"]
    assert config.several == {"a": "/home/me/a", "b": "/~/b"}
    content["several"]["a"] = "~no.one.here/a"
    with pytest.raises(ValueError, match=r"several.a='~no.one.here/a': expected the whole path"):
        load_config(Paths, OmegaConf.create(content))


def test_a_tilde_may_stand_on_the_command_line(monkeypatch: pytest.MonkeyPatch) -> None:
    """Hydra knows none outside quotes, and no shell expands those behind ``=``."""
    monkeypatch.setenv("HOME", "/home/me")
    arguments = ["weights=~/a,~root/b", "x='~/c'", "--config-dir=~/d", "predictions={a: ~/e}", "y=a~/b"]
    monkeypatch.setattr(sys, "argv", ["program", *arguments])
    status_of(Jobs("score", Config), [], lambda config: None)
    assert sys.argv[1:] == [
        *(f"weights=/home/me/a,{os.path.expanduser('~root')}/b", "x='~/c'", "--config-dir=/home/me/d"),
        *("predictions={a: /home/me/e}", "y=a~/b"),
    ]
    assert user_path("~/a") == Path("/home/me/a")
    assert user_path("~a") == Path("~a")
    with pytest.raises(argparse.ArgumentTypeError, match=r"'~no.one/a': expected the whole path, as no home folder"):
        user_path("~no.one/a")


@pytest.mark.parametrize(
    ("argument", "value"),
    [("output=J&F", "J&F"), ("output=a/R&D/b-1.2", "a/R&D/b-1.2"), ("output='R&D'", "R&D"), ('output="R&D"', "R&D")],
)
def test_an_ampersand_may_stand_on_the_command_line(argument: str, value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """``trainer.keep_best=J&F``: Hydra knows none outside quotes, and shells take the quotes away."""
    monkeypatch.setattr(sys, "argv", ["program", argument])
    status_of(Jobs("score", Config), [], lambda config: None)
    assert OverridesParser.create().parse_override(sys.argv[1]).value() == value


def test_a_terminal_that_shows_ascii_alone_gets_escapes(monkeypatch: pytest.MonkeyPatch) -> None:
    written = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(written, encoding="ascii", write_through=True))
    escape_output()
    print("猫 é")
    assert written.getvalue() == b"\\u732b \\xe9\n"
