"""The MINDIE_LOG_* variables: one value or one per component, and what a wrong one does."""

from __future__ import annotations

from pathlib import Path

import pytest

from engine.logs.options import LogOptions, Rotation, read_levels, read_options

HOME = Path("/home/somebody")


def options(**variables: str) -> LogOptions:
    return read_options({"HOME": str(HOME), **variables})


def test_defaults() -> None:
    found = options()
    assert found.warnings == ()
    for each in found.of.values():
        assert (each.level, each.to_file, each.to_stdout, each.verbose) == ("INFO", True, False, True)
        assert each.folder == HOME / "mindie" / "log"
        assert each.rotation == Rotation(20 << 20, 10)


@pytest.mark.parametrize(
    ("text", "levels"),
    [
        ("debug", ("DEBUG", "DEBUG", "DEBUG")),
        ("llm:debug;server:Info;*:warn", ("DEBUG", "WARN", "INFO")),
        (" llm : error ; ", ("ERROR", "INFO", "INFO")),
        ("*:critical", ("CRITICAL", "CRITICAL", "CRITICAL")),
    ],
)
def test_levels_of_llm_llmmodels_and_server(text: str, levels: tuple[str, ...]) -> None:
    found = options(MINDIE_LOG_LEVEL=text)
    assert tuple(found.levels.values()) == levels and not found.warnings


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("MINDIE_LOG_LEVEL", "loud"),
        ("MINDIE_LOG_LEVEL", "llm:debug;info"),
        ("MINDIE_LOG_LEVEL", "llm:debug;engine:info"),
        ("MINDIE_LOG_TO_FILE", "yes"),
        ("MINDIE_LOG_TO_STDOUT", "2"),
        ("MINDIE_LOG_VERBOSE", "llm:on"),
        ("MINDIE_LOG_PATH", "/x" * 2048),
        ("MINDIE_LOG_ROTATE", "-fs 0"),
        ("MINDIE_LOG_ROTATE", "-fs 501 -r 3"),
        ("MINDIE_LOG_ROTATE", "-r 65"),
        ("MINDIE_LOG_ROTATE", "-fs"),
        ("MINDIE_LOG_ROTATE", "-fs 1 -fs 2"),
        ("MINDIE_LOG_ROTATE", "-fs \u0661"),
        ("MINDIE_LOG_ROTATE", "20"),
    ],
)
def test_a_wrong_value_is_named_and_the_default_taken(name: str, text: str) -> None:
    found = options(**{name: text})
    assert found.of == options().of
    ((_, warning),) = found.warnings
    assert warning.startswith(f"{name}=") and "allowed" in warning and "using" in warning


@pytest.mark.parametrize(
    ("text", "folder"),
    [
        ("/var/log/x", Path("/var/log/x/log")),
        ("blue", HOME / "mindie" / "log" / "blue"),
        ("~/here", HOME / "here" / "log"),
    ],
)
def test_where_the_files_lie(text: str, folder: Path) -> None:
    assert {each.folder for each in options(MINDIE_LOG_PATH=text).of.values()} == {folder}


def test_a_path_of_one_component() -> None:
    found = options(MINDIE_LOG_PATH="llmmodels:/data/models")
    assert found.of["llmmodels"].folder == Path("/data/models/log")
    assert found.of["llm"].folder == HOME / "mindie" / "log"


@pytest.mark.parametrize(
    ("variables", "rotation"),
    [
        ({"MINDIE_LOG_ROTATE": "-fs 1 -r 2"}, Rotation(1 << 20, 2)),
        ({"MINDIE_LOG_ROTATE": "-r 64 -fs 500"}, Rotation(500 << 20, 64)),
        ({"MINDIE_LOG_ROTATE": "-r 3"}, Rotation(20 << 20, 3)),
        ({"PYTHON_LOG_MAXSIZE": "4096"}, Rotation(4096, 10)),
        ({"PYTHON_LOG_MAXSIZE": "4096", "MINDIE_LOG_ROTATE": "-r 3"}, Rotation(4096, 3)),
        ({"PYTHON_LOG_MAXSIZE": "4096", "MINDIE_LOG_ROTATE": "-fs 2"}, Rotation(2 << 20, 10)),
        ({"PYTHON_LOG_MAXSIZE": "0"}, Rotation(20 << 20, 10)),
    ],
)
def test_rotation(variables: dict[str, str], rotation: Rotation) -> None:
    assert options(**variables).of["server"].rotation == rotation


def test_names_that_are_no_longer_read_are_told_with_their_replacement_once() -> None:
    names = (
        "MIES_PYTHON_LOG_LEVEL", "MIES_PYTHON_LOG_MAXSIZE", "MINDIE_LLM_LOG_PATH", "ATB_LOG_TO_STDOUT",
        "OCK_LOG_TO_FILE", "LOG_LEVEL", "LOG_TO_FILE",
    )  # fmt: skip
    ((_, warning),) = options(**dict.fromkeys(names, "1"), MY_LOG_LEVEL="1").warnings
    assert all(name in warning for name in names) and "MY_LOG_LEVEL" not in warning
    assert "MINDIE_LLM_LOG_PATH (use MINDIE_LOG_PATH)" in warning
    assert "OCK_LOG_TO_FILE (use MINDIE_LOG_TO_FILE)" in warning
    assert "MIES_PYTHON_LOG_MAXSIZE (use MINDIE_LOG_ROTATE)" in warning


def test_levels_as_the_configuration_has_them() -> None:
    assert read_levels("llm:debug;*:info;") == {"llm": "DEBUG", "*": "INFO"}
    with pytest.raises(ValueError, match="loud"):
        read_levels("loud")
