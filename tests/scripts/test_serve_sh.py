"""scripts/serve.sh as a new user runs it: set up, ask, run again, break something, stop."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest

from tests.harness import REPO, eventually, free_ports

NOT_COPIED = shutil.ignore_patterns(".*", "__pycache__", "mindie-service", "shared", "tests", "docs")


@dataclass
class Place:
    """A copy of the tree and the directory that its serve.sh installs into."""

    tree: Path
    home: Path

    def serve(self, *arguments: str, **environ: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            ["bash", str(self.tree / "scripts" / "serve.sh"), "--dir", str(self.home), *arguments],
            cwd=self.tree.parent,  # not the tree: the script has to find itself
            env={**os.environ, **environ},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=280,
        )

    def serving(self) -> subprocess.Popen[str]:
        """serve.sh in the background, in a process group of its own as in a terminal."""
        return subprocess.Popen(
            ["bash", str(self.tree / "scripts" / "serve.sh"), "--dir", str(self.home)],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )

    def content(self) -> dict[str, tuple[int, int]]:
        """Time of change and size of every file but the log and Python's caches."""
        files = (
            path for path in self.home.rglob("*") if path.is_file() and path.suffix not in (".pyc", ".log")
        )
        return {str(path): (path.stat().st_mtime_ns, path.stat().st_size) for path in files}

    def parent(self) -> psutil.Process:
        """The running daemon's parent process."""
        pids = self.processes()
        return next(process for process in map(psutil.Process, pids) if process.ppid() not in pids)

    def kill_all(self) -> None:
        """Whatever a test before has left running."""
        for pid in self.processes():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        eventually(lambda: not self.processes(), 30, "the end of all")

    def processes(self) -> list[int]:
        """Everything that runs in the installation directory."""
        found = []
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error):
                if process.cwd() == str(self.home):
                    found.append(process.pid)
        return found


def commands(output: str, program: str) -> list[str]:
    return [line for line in output.splitlines() if line.startswith(f"{program} ")]


def paste(command: str) -> str:
    """What bash makes of a printed line, pasted somewhere else."""
    done = subprocess.run(["bash", "-c", command], cwd="/", capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr
    return done.stdout


def stop(output: str) -> None:
    (command,) = commands(output, "kill")
    pid = int(command.split()[1])
    paste(command)
    eventually(lambda: not is_alive(pid), 30, f"the end of {pid}")


def is_alive(pid: int) -> bool:
    """A zombie is not: in a container it may wait for ever for an init that reaps."""
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


@contextlib.contextmanager
def bad_port(place: Place) -> Iterator[None]:
    path = place.home / "conf" / "config.json"
    good = path.read_text()
    path.write_text(re.sub(r'"port": \d+', '"port": 80', good))
    try:
        yield
    finally:
        path.write_text(good)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Place:
    """With the dependencies of the interpreter that runs the tests: pip finds them, nothing is downloaded."""
    base = tmp_path_factory.mktemp("serve")
    shutil.copytree(REPO, base / "tree", ignore=NOT_COPIED)
    home = base / "a home with spaces"
    subprocess.run([sys.executable, "-m", "venv", str(home)], check=True, timeout=100)
    (site_packages,) = home.glob("lib/python*/site-packages")
    (site_packages / "dependencies.pth").write_text(sysconfig.get_paths()["purelib"] + "\n")
    return Place(base / "tree", home)


@pytest.fixture(scope="module")
def first_run(place: Place) -> Iterator[str]:
    """What the first run printed; the service runs until the end of the module, unless a test stops it."""
    port, management_port, metrics_port = free_ports(3)
    done = place.serve(
        "--port", str(port), f"--management-port={management_port}", f"--metrics-port={metrics_port}"
    )
    assert done.returncode == 0, done.stdout + done.stderr
    yield done.stdout
    for pid in place.processes():
        os.kill(pid, signal.SIGTERM)
    eventually(lambda: not place.processes(), 30, "nothing left running")


@pytest.mark.slow
@pytest.mark.timeout(300)
class TestFromBareToServing:
    """One service for all of them, in the order written: they tell one story."""

    def test_it_is_installed_as_the_manual_knows_it(self, place: Place, first_run: str) -> None:
        for name in (
            "bin/mindieservice_daemon",
            "conf/config.json",
            "security/ca/ca.pem",
            "models/mindie-tiny",
        ):
            assert (place.home / name).exists(), name
        assert "Daemon start success!\n" in (place.home / "output.log").read_text()
        assert list((place.home / "logs" / "log" / "debug").glob("mindie-server_*.log"))
        assert not (place.tree / "build").exists()
        assert not list(place.tree.glob("*.egg-info"))

    def test_the_planes_and_the_chosen_ports_are_told(self, place: Place, first_run: str) -> None:
        server = json.loads((place.home / "conf" / "config.json").read_text())["ServerConfig"]
        for plane, address, key in (
            ("business", "ipAddress", "port"),
            ("management", "managementIpAddress", "managementPort"),
            ("metrics", "managementIpAddress", "metricsPort"),
        ):
            assert re.search(rf"^{plane} +https://{server[address]}:{server[key]}$", first_run, re.MULTILINE)

    def test_the_printed_lines_get_answers_when_pasted(self, first_run: str) -> None:
        models, chat = commands(first_run, "curl")
        assert json.loads(paste(models))["data"][0]["id"] == "mindie-tiny"
        choice = json.loads(paste(chat))["choices"][0]
        assert choice["finish_reason"] == "stop"
        assert len(choice["message"]["content"].split()) > 20

    def test_a_second_run_changes_nothing_and_says_so(self, place: Place, first_run: str) -> None:
        before = place.content()
        again = place.serve()
        assert again.returncode == 0, again.stderr
        assert "running already" in again.stdout
        assert "nothing was changed" in again.stdout
        assert commands(again.stdout, "kill") == commands(first_run, "kill")
        assert commands(again.stdout, "curl") == commands(first_run, "curl")
        assert place.content() == before

    def test_other_ports_for_a_running_service_are_refused(self, place: Place, first_run: str) -> None:
        before = place.content()
        refused = place.serve("--port", str(free_ports(1)[0]))
        assert refused.returncode == 1
        assert "kill" in refused.stderr
        assert place.content() == before

    def test_after_a_stop_it_starts_again_with_everything_unchanged(
        self, place: Place, first_run: str
    ) -> None:
        stop(first_run)
        before = place.content()
        again = place.serve()
        assert again.returncode == 0, again.stderr
        stop(again.stdout)
        assert [line for line in again.stdout.splitlines() if "installed" in line or "copied" in line] == []
        assert place.content() == before

    def test_without_tls_and_back(self, place: Place, first_run: str) -> None:
        secure = place.serve().stdout
        refused = place.serve("--http")
        assert refused.returncode == 1 and "httpsEnabled false" in refused.stderr
        stop(secure)
        plain = place.serve("--http")
        assert plain.returncode == 0, plain.stdout + plain.stderr
        models, chat = commands(plain.stdout, "curl")
        assert " http://" in models and "--cert" not in models
        assert "mindie-tiny" in paste(models) and "choices" in paste(chat)
        stop(plain.stdout)
        secure = place.serve("--https").stdout
        assert " https://" in secure
        stop(secure)

    def test_a_bad_configuration_is_told_with_its_cause(self, place: Place, first_run: str) -> None:
        with bad_port(place):
            failed = place.serve()
        assert failed.returncode == 1
        assert "ServerConfig.port=80" in failed.stderr
        assert "[1024, 65535]" in failed.stderr

    def test_changed_sources_are_installed_and_removed_ones_vanish(
        self, place: Place, first_run: str
    ) -> None:
        extra = place.tree / "engine" / "extra.py"
        extra.write_text("")
        (installed,) = place.home.glob("lib/python*/site-packages/mindie_server/engine")
        with bad_port(place):  # it need not start to be installed
            for exists in (True, False):
                assert "bin/mindieservice_daemon installed" in place.serve().stdout
                assert (installed / "extra.py").exists() == exists
                extra.unlink(missing_ok=True)

    def test_two_at_once_start_one_service(self, place: Place, first_run: str) -> None:
        with place.serving() as first, place.serving() as second:
            outputs = [run.communicate(timeout=200) for run in (first, second)]
        assert [run.returncode for run in (first, second)] == [0, 0], outputs
        assert sorted("running already" in out for out, _ in outputs) == [False, True]
        assert len({command for out, _ in outputs for command in commands(out, "kill")}) == 1

    def test_a_stopping_service_is_waited_for_and_started_again(self, place: Place, first_run: str) -> None:
        old = place.parent()
        worker = max(old.children(), key=lambda child: child.memory_info().rss)
        worker.suspend()  # so that the end takes as long as we want
        try:
            old.terminate()
            with place.serving() as run:
                assert run.stdout is not None
                line = next(line for line in run.stdout if line.startswith("waiting "))
                assert f"process {old.pid}" in line
                worker.resume()
                out, errors = run.communicate(timeout=100)
        finally:
            with contextlib.suppress(psutil.NoSuchProcess):
                worker.resume()
        assert run.returncode == 0, errors
        assert "running already" not in out
        assert not is_alive(old.pid)

    def test_a_starting_service_is_waited_for(self, place: Place, first_run: str) -> None:
        place.kill_all()
        path = place.home / "output.log"
        with path.open("wb") as log:
            daemon = subprocess.Popen(
                ["bin/mindieservice_daemon"],
                cwd=place.home,
                stdout=log,
                stderr=log,
                env={**os.environ, "MINDIE_LOG_PATH": str(place.home / "logs")},
            )
        try:
            eventually(lambda: path.stat().st_size, 30, "a first word")  # before, it has no name
            joined = place.serve()
        finally:
            daemon.terminate()
            daemon.wait(30)
        assert joined.returncode == 0, joined.stdout + joined.stderr
        assert f"process {daemon.pid}" in joined.stdout
        assert "running already" in joined.stdout
        assert commands(joined.stdout, "kill") == [f"kill {daemon.pid}"]

    def test_what_was_interrupted_is_done_again(self, place: Place, first_run: str) -> None:
        """As a kill leaves it: temporary copies that are not whole, and no stamp of what had begun."""
        place.kill_all()
        whole = place.content().keys()
        (place.home / "security").rename(place.home / ".security.new")
        (place.home / ".security.new/client/client.key.pem").unlink()
        models = place.home / "models"
        (models / "mindie-tiny").rename(models / ".mindie-tiny.new")
        (models / ".mindie-tiny.new/config.json").unlink()
        for step in ("model", "sources"):
            (place.home / f".stamp-{step}").unlink()
        with bad_port(place):
            place.serve()
        assert place.content().keys() == whole

    def test_interrupted_it_takes_the_service_along(self, place: Place, first_run: str) -> None:
        place.kill_all()
        with place.serving() as script:
            assert script.stdout is not None
            started = next(line for line in script.stdout if "role=endpoint" in line)
            os.killpg(script.pid, signal.SIGINT)
            _, errors = script.communicate(timeout=60)
        assert script.returncode == 1, started
        assert "the service was stopped" in errors
        assert place.processes() == []

    def test_the_exit_code_is_that_of_the_daemon(self, place: Place, first_run: str) -> None:
        place.kill_all()
        certificate = place.home / "security" / "certs" / "server.pem"
        good = certificate.read_bytes()
        certificate.write_text("no certificate")
        failed = place.serve()
        certificate.write_bytes(good)
        assert failed.returncode == 4, failed.stderr
        assert str(certificate) in failed.stderr


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--nonsense"], "--nonsense"),
        (["--port"], "--port needs a value"),
        (["--port", "80a"], "80a: not a port number"),
        (["--metrics-port="], "not a port number"),
        (["--http=yes"], "--http=yes"),
    ],
)
def test_a_bad_command_line_is_refused(tmp_path: Path, arguments: list[str], says: str) -> None:
    home = tmp_path / "home"
    refused = Place(REPO, home).serve(*arguments)
    assert refused.returncode == 1
    assert says in refused.stderr
    assert not home.exists()


def test_a_directory_that_holds_something_else_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "letter.txt").write_text("dear")
    refused = Place(REPO, tmp_path).serve()
    assert refused.returncode == 1
    assert str(tmp_path) in refused.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["letter.txt"]


def test_an_old_python_is_named(tmp_path: Path) -> None:
    refused = Place(REPO, tmp_path / "home").serve(PYTHON="/bin/false")
    assert refused.returncode == 1
    assert "Python 3.10 or newer" in refused.stderr
    assert "/bin/false" in refused.stderr


def test_python_counts_from_where_the_caller_is(tmp_path: Path) -> None:
    (tmp_path / "bin").mkdir()
    python = tmp_path / "bin" / "python"
    python.write_text('#!/bin/sh\ntouch "$0.was-asked"\nexit 1\n')
    python.chmod(0o755)
    refused = subprocess.run(
        ["bash", str(REPO / "scripts" / "serve.sh"), "--dir", "home"],
        cwd=tmp_path,
        env={**os.environ, "PYTHON": "bin/python"},
        capture_output=True,
        timeout=60,
    )
    assert refused.returncode == 1
    assert (tmp_path / "bin" / "python.was-asked").exists()


def test_help_is_shown(tmp_path: Path) -> None:
    shown = Place(REPO, tmp_path / "home").serve("--help")
    assert shown.returncode == 0
    for option in ("--dir", "--port", "--management-port", "--metrics-port"):
        assert option in shown.stdout
