"""What our code must not do, read from its syntax trees: promise P8, and the clocks of fault row F23.

Nothing that comes from outside is unpickled or run, no shell reads our commands, secrets are not drawn from
`random`, and the wall clock is read only where a time of day is what is wanted: a deadline never is.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

REPO = Path(__file__).resolve().parents[1]
FOLDERS = ("daemon", "endpoint", "engine", "worker", "scripts")

FORBIDDEN = {
    **dict.fromkeys(
        ("pickle", "_pickle", "cPickle", "cloudpickle", "dill", "joblib", "jsonpickle", "marshal", "shelve"),
        "reading it runs code",
    ),
    "multiprocessing": "its queues and pipes pickle",
    "torch.multiprocessing": "its queues and pipes pickle",
    "concurrent.futures.ProcessPoolExecutor": "its queues pickle",
    "torch.load": "it unpickles; safetensors does not",
    "torch.save": "it pickles; safetensors does not",
    "yaml": "yaml.load makes objects of any class; configuration is JSON",
    "eval": "runs text",
    "exec": "runs text",
    "compile": "makes code of text",
    "__import__": "imports by text; importlib.import_module with a name out of a table does not",
    "os.system": "a shell reads the command",
    "os.popen": "a shell reads the command",
    "subprocess.getoutput": "a shell reads the command",
    "subprocess.getstatusoutput": "a shell reads the command",
    "tempfile.mktemp": "somebody else may make the file first",
}
BUILTINS = {"eval", "exec", "compile", "__import__"}
FORBIDDEN_ARGUMENTS = {
    "shell": "a shell reads the command",
    "allow_pickle": "numpy unpickles",
}
RANDOM = "guessable; `secrets` is not"
WALL_CLOCK = {
    "time.time", "time.time_ns", "time.localtime", "time.gmtime", "time.ctime", "time.strftime",
    "datetime.datetime.now", "datetime.datetime.utcnow", "datetime.datetime.today", "datetime.date.today",
    "time.clock_gettime",
}  # fmt: skip

# (file, name) -> why it may
ALLOWED = {
    ("daemon/child.py", "random"): "a forked child starts a sequence of its own",
    ("daemon/reload.py", "datetime.datetime.now"): "dynamicLogLevelValidTime is a time of day",
    ("engine/logs/lines.py", "time.time"): "when a line was written",
    ("engine/logs/lines.py", "time.localtime"): "when a line was written",
    ("engine/logs/lines.py", "time.strftime"): "when a line was written",
    ("engine/logs/room.py", "time.time"): "names of log files",
    ("endpoint/grammar_sandbox.py", "random"): "walks that try a grammar out",
    ("endpoint/live_tls.py", "time.time"): "days until a certificate ends",
    ("endpoint/main.py", "time.time"): "`created` of the model cards",
    ("endpoint/protocols/openai_reply.py", "time.time"): "`created` of an answer",
    ("endpoint/template_child.py", "datetime.datetime.now"): "strftime_now of chat templates",
    ("endpoint/tls.py", "datetime.datetime.now"): "certificates say until which day they are good",
    ("scripts/make_certs.py", "datetime.datetime.now"): "certificates say until which day they are good",
    ("scripts/bench_serving.py", "datetime.datetime.now"): "the date of a report",
    ("scripts/bench_serving.py", "random"): "prompts that can be had again",
    ("scripts/chaos.py", "random"): "faults that can be had again",
    ("scripts/chaos_faults.py", "random"): "faults that can be had again",
    ("scripts/footprint.py", "time.time"): "the age of a process, which psutil tells as a time of day",
    ("scripts/fuzz_cases.py", "random"): "cases that can be had again",
    ("scripts/measure_startup.py", "time.time"): "compared with the times in log lines",
    ("scripts/traffic.py", "random"): "load that can be had again",
    ("scripts/traffic_requests.py", "random"): "load that can be had again",
    ("scripts/verify_determinism.py", "random"): "prompts that can be had again",
    ("scripts/train_tiny_model.py", "random"): "training that can be had again",
    ("scripts/train_tiny_model.py", "torch.load"): "the checkpoint the same developer wrote, weights_only",
    ("scripts/train_tiny_model.py", "torch.save"): "that checkpoint",
}


def findings(source: str) -> Iterator[tuple[str, str]]:
    """(name, why not) of everything in `source` that needs leave."""
    tree = ast.parse(source)
    names = _imported(tree)
    for node in ast.walk(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            for name in _origins(node):
                yield from _judged(name)
        elif isinstance(node, ast.Attribute | ast.Name) and isinstance(node.ctx, ast.Load):
            name = _full_name(node, names)
            if name is not None:
                yield from _judged(name)
        elif isinstance(node, ast.keyword) and node.arg in FORBIDDEN_ARGUMENTS and not _is_false(node.value):
            yield f"{node.arg}=", FORBIDDEN_ARGUMENTS[node.arg]


def _is_false(value: ast.expr) -> bool:
    return isinstance(value, ast.Constant) and not value.value


def _imported(tree: ast.AST) -> dict[str, str]:
    """Names of this module -> what they were imported from."""
    names = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                first = alias.name.partition(".")[0]
                names[alias.asname or first] = alias.name if alias.asname else first
        elif isinstance(node, ast.ImportFrom) and not node.level:
            names |= {alias.asname or alias.name: f"{node.module}.{alias.name}" for alias in node.names}
    return names


def _origins(node: ast.Import | ast.ImportFrom) -> list[str]:
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    return [] if node.level else [f"{node.module}.{alias.name}" for alias in node.names]


def _full_name(node: ast.expr, names: dict[str, str]) -> str | None:
    """`t.time` of a module that says `import time as t` -> time.time. None for what was not imported."""
    if isinstance(node, ast.Attribute):
        base = _full_name(node.value, names)
        return None if base is None or base in BUILTINS else f"{base}.{node.attr}"
    if isinstance(node, ast.Name):
        return names.get(node.id) or (node.id if node.id in BUILTINS else None)
    return None


def _judged(name: str) -> Iterator[tuple[str, str]]:
    if name in WALL_CLOCK:
        yield name, "jumps; deadlines and durations want time.monotonic"
        return
    top = name.partition(".")[0]
    if top == "random":
        yield "random", RANDOM
    for forbidden in (name, top):
        if forbidden in FORBIDDEN:
            yield forbidden, FORBIDDEN[forbidden]
            return


def files() -> list[Path]:
    return [path for folder in FOLDERS for path in sorted((REPO / folder).rglob("*.py"))]


def test_P8_nothing_is_unpickled_or_evaluated_and_F23_no_deadline_reads_the_wall_clock() -> None:
    read, found = set(), set()
    for path in files():
        name = str(path.relative_to(REPO))
        read.add(path.relative_to(REPO).parts[0])
        found |= {(name, *finding) for finding in findings(path.read_text(encoding="utf-8"))}
    assert read == set(FOLDERS)
    assert sorted(f for f in found if f[:2] not in ALLOWED) == []
    assert set(ALLOWED) <= {(path, name) for path, name, _ in found}, "an exception that nothing needs"


@pytest.mark.parametrize(
    ("source", "name"),
    [
        ("import pickle", "pickle"),
        ("import os, marshal as m", "marshal"),
        ("from shelve import open as o", "shelve"),
        ("def f():\n    import dill", "dill"),
        ("from multiprocessing import Queue", "multiprocessing"),
        ("import multiprocessing.shared_memory", "multiprocessing"),
        ("from concurrent.futures import ProcessPoolExecutor", "concurrent.futures.ProcessPoolExecutor"),
        ("import torch as t\nt.load('a.pt')", "torch.load"),
        ("from torch import load", "torch.load"),
        ("import yaml", "yaml"),
        ("eval('1')", "eval"),
        ("run = exec", "exec"),
        ("compile(text, 'x', 'exec')", "compile"),
        ("__import__(name)", "__import__"),
        ("import os\nos.system('ls')", "os.system"),
        ("import subprocess\nsubprocess.run('ls', shell=True)", "shell="),
        ("import subprocess\nsubprocess.run('ls', shell=value)", "shell="),
        ("import numpy as np\nnp.load(f, allow_pickle=True)", "allow_pickle="),
        ("import random\ntoken = random.random()", "random"),
        ("from random import choice", "random"),
        ("import time\nuntil = time.time() + 1", "time.time"),
        ("import time as t\nclock = t.time", "time.time"),
        ("from time import time", "time.time"),
        ("from datetime import datetime\ndatetime.now()", "datetime.datetime.now"),
        ("import datetime as d\nd.datetime.now()", "datetime.datetime.now"),
    ],
)
def test_the_gate_catches_what_is_planted(source: str, name: str) -> None:
    assert name in {found for found, _ in findings(source)}


@pytest.mark.parametrize(
    "source",
    [
        "import re\nre.compile('a')\nmodel.eval()\nimport torch\ntorch.compile(model)",
        "import time\ntime.monotonic()\ntime.sleep(1)",
        "import subprocess\nsubprocess.run(['ls'], shell=False)",
        "import secrets, json, numpy as np\njson.load(f)\nnp.load(f)\nsecrets.token_hex(8)",
        "from concurrent.futures import ThreadPoolExecutor\nfrom datetime import timezone",
    ],
)
def test_and_nothing_else(source: str) -> None:
    assert list(findings(source)) == []
