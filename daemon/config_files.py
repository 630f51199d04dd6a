"""What the configuration needs on disk: certificates, the model directory, and who may read them."""

from __future__ import annotations

import difflib
import os
import shlex
import stat
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from daemon.config_report import Report
from daemon.config_schema import DEPLOY, MODEL, SERVER
from daemon.config_values import Values
from endpoint.tls import KEY_PREFIX
from engine.file_modes import DIRECTORY_MODE, access_problems
from engine.quantisation import read_quantisation
from engine.settings import Plane, TlsFiles
from engine.weight_files import WeightFault, did_you_mean, read_json_object, read_weights

PERMISSION_VARIABLE = "MINDIE_CHECK_INPUTFILES_PERMISSION"
FILE_MODE = 0o640
SECRET_MODE = 0o600


def is_there(path: Path) -> bool:
    """Only what is missing is not: a path that cannot be looked at counts, so that its reader complains."""
    return not isinstance(_look(path), FileNotFoundError | NotADirectoryError)


def _look(path: Path) -> os.stat_result | OSError:
    """`os.stat` for paths out of a configuration, where every failure is somebody's finding."""
    try:
        return path.stat()
    except OSError as error:
        return error


def path_fault(path: Path, want: Literal["file", "directory"]) -> str | None:
    """What keeps `path` from being read; None when nothing does."""
    info = _look(path)
    if isinstance(info, FileNotFoundError | NotADirectoryError):
        return f"no such {want}: {path}"
    if isinstance(info, OSError):
        return f"cannot be read: {path}: {info.strerror}"
    if want == "file":
        if not stat.S_ISREG(info.st_mode):
            return f"not a regular file: {path}"
        needed, option = os.R_OK, "u+r"
    else:
        if not stat.S_ISDIR(info.st_mode):
            return f"not a directory: {path}"
        needed, option = os.R_OK | os.X_OK, "u+rx"
    return None if os.access(path, needed) else f"cannot be read: {path}; {_to_read(path, info, option)}"


def _to_read(path: Path, info: os.stat_result, option: str) -> str:
    """The command that lets us read what is there."""
    place = shlex.quote(str(path))
    if info.st_uid != os.geteuid():
        return f"it belongs to uid {info.st_uid}; run: chown {os.geteuid()} {place}"
    return f"run: chmod {option} {place}"


class Permissions:
    """Who may own and read which file. Secrets refuse, others warn, unless the environment says otherwise."""

    def __init__(self, environ: Mapping[str, str], report: Report) -> None:
        self._strict = environ.get(PERMISSION_VARIABLE) == "1"
        self._off = environ.get(PERMISSION_VARIABLE) == "0"
        self._report = report
        if environ.get(PERMISSION_VARIABLE) not in (None, "", "0", "1"):
            report.warn(f"{PERMISSION_VARIABLE}={environ[PERMISSION_VARIABLE]}: neither 0 nor 1, ignored")

    @property
    def policy(self) -> Literal["warn", "refuse", "off"]:
        """What is done about files that are no secrets."""
        return "off" if self._off else "refuse" if self._strict else "warn"

    def check(self, key: str, value: object, path: Path, limit: int, secret: bool = False) -> None:
        """Report `path` when its mode is wider than `limit` or it belongs to somebody else.

        A directory is judged with the files in it, which may be as wide as `limit` without the x bits.
        """
        if self._off:
            return
        for wrong, command in access_problems(path, limit):
            if secret or self._strict:
                limits = f"mode {limit:04o} or tighter, owner uid {os.geteuid()}"
                self._report.refuse(key, value, f"{wrong}; run: {command}", limits)
            else:
                self._report.warn(f"{key}={path}: {wrong}; run: {command}")


# --- certificates ---


def find_tls_files(
    plane: Plane, root: Path, values: Values, permissions: Permissions, report: Report
) -> TlsFiles | None:
    """The certificate set of a listener whose first plane is `plane`; None when there is a finding about it.

    Only presence, place and permissions are judged here; what the files hold is judged in endpoint/tls.py.
    """
    before = len(report.findings)
    prefix = f"{SERVER}.{KEY_PREFIX[plane]}"
    place = _SecuredFiles(root, permissions, report)
    ca_files = place.many(f"{SERVER}.tlsCaPath", f"{prefix}CaFile", values)
    certificate = place.one(f"{prefix}Cert", values)
    key = place.one(f"{prefix}Pk", values, secret=True)
    password = None
    if values.has(f"{prefix}PkPwd") and values.text(f"{prefix}PkPwd"):
        password = place.one(f"{prefix}PkPwd", values, secret=True)
    crl_files: tuple[Path, ...] = ()
    wants_crl = all(
        values.has(path) and values.raw(path) for path in (f"{prefix}CrlPath", f"{prefix}CrlFiles")
    )
    if wants_crl:
        hint = f", or set {prefix}CrlFiles to [] to disable revocation checks"
        crl_files = place.many(f"{prefix}CrlPath", f"{prefix}CrlFiles", values, hint)
    if certificate is None or key is None or not ca_files or len(report.findings) > before:
        return None
    return TlsFiles(ca_files, certificate, key, password, crl_files)


class _SecuredFiles:
    """Files named by the HTTPS keys: below the installation root, and not reached through a symbolic link."""

    def __init__(self, root: Path, permissions: Permissions, report: Report) -> None:
        self._root = root.resolve()
        self._permissions = permissions
        self._report = report

    def one(self, key: str, values: Values, secret: bool = False) -> Path | None:
        if not self._given(key, values):
            return None
        return self._check(key, values.text(key), values.text(key), secret, "")

    def many(self, directory_key: str, names_key: str, values: Values, hint: str = "") -> tuple[Path, ...]:
        """Every file of the list `names_key` in the directory `directory_key`."""
        given = [self._given(key, values) for key in (directory_key, names_key)]
        if not all(given):
            return ()
        paths = (
            self._check(f"{names_key}[{index}]", name, f"{values.text(directory_key)}/{name}", False, hint)
            for index, name in enumerate(values.raw(names_key))
        )
        return tuple(path for path in paths if path is not None)

    def _given(self, key: str, values: Values) -> bool:
        if not values.has(key):
            return False  # has a finding of its own already
        if values.raw(key) is None:
            self._report.absent(key, f"a path below {self._root}, or set httpsEnabled=false")
            return False
        return True

    def _check(self, key: str, value: str, relative: str, secret: bool, hint: str) -> Path | None:
        path = Path(os.path.normpath(f"{self._root}/{relative}"))
        wrong = self._place_fault(path) or path_fault(path, "file")
        if wrong:
            allowed = f"a readable file below {self._root}, or set httpsEnabled=false{hint}"
            self._report.refuse(key, value, wrong, allowed)
            return None
        self._permissions.check(key, value, path, SECRET_MODE if secret else FILE_MODE, secret)
        return path

    def _place_fault(self, path: Path) -> str | None:
        if not path.is_relative_to(self._root):
            return f"{path} lies outside of the installation root"
        steps = [path, *path.parents][: len(path.parts) - len(self._root.parts)]
        # not Path.is_symlink, which raises where a directory on the way cannot be entered
        link = next((step for step in reversed(steps) if os.path.islink(step)), None)
        return f"{link} is a symbolic link" if link is not None else None


# --- model directory ---

_WEIGHT_PATH = f"{MODEL}.modelWeightPath"
_PICKLED = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
_SMALL_JSON = ("tokenizer_config.json", "special_tokens_map.json", "generation_config.json")  # all optional
_MAX_SMALL_BYTES = 16 * 2**20
_MAX_TOKENIZER_BYTES = 256 * 2**20  # the largest vocabularies in use take some 35 MiB


def find_model(root: Path, values: Values, permissions: Permissions, report: Report) -> Path:
    """The model directory, absolute. Everything wrong with it becomes a finding."""
    given = values.text(_WEIGHT_PATH)
    path = root / given  # an absolute path replaces the root
    allowed = "a directory with config.json, tokenizer.json and *.safetensors"
    if wrong := path_fault(path, "directory"):
        nearest = "" if is_there(path) else _nearest(path)
        report.refuse(_WEIGHT_PATH, given, wrong + nearest, allowed)
        return path
    permissions.check(_WEIGHT_PATH, given, path, DIRECTORY_MODE)
    names = sorted(entry.name for entry in path.iterdir())
    if not is_mock(values):
        faults = [*_tokenizer_faults(path, names), *_json_faults(path, names), *_weight_faults(path, names)]
        for wrong in faults:
            report.refuse(_WEIGHT_PATH, given, wrong, allowed)
    if "config.json" in names or not is_mock(values):
        _check_model_config(path, given, names, values, report)
    return path


def is_mock(values: Values) -> bool:
    """Whether no weights are wanted: then the files of the model may be there or not."""
    path = f"{MODEL}.modelInstanceType"
    return values.has(path) and values.text(path) == "StandardMock"


def _nearest(path: Path) -> str:
    try:
        siblings = [entry.name for entry in path.parent.iterdir()]
    except OSError:
        return ""
    close = difflib.get_close_matches(path.name, siblings, 1)
    return f" (did you mean {path.parent / close[0]}?)" if close else ""


def _tokenizer_faults(path: Path, names: list[str]) -> list[str]:
    file = path / "tokenizer.json"
    if "tokenizer.json" not in names:
        return [f"no tokenizer.json in {path}{did_you_mean('tokenizer.json', names)}"]
    if wrong := path_fault(file, "file"):
        return [wrong]
    try:
        size, last = _size_and_end(file)
    except OSError as error:
        return [f"cannot be read: {file}: {error.strerror}"]
    if size > _MAX_TOKENIZER_BYTES:
        return [f"{file} has {size} bytes; at most {_MAX_TOKENIZER_BYTES} are read"]
    if last != b"}":  # it is parsed by who needs it, but a copy cut short is known at once
        return [f"{file} has {size} bytes and is cut short: expected }} at its end, found {last!r}"]
    return []


def _size_and_end(file: Path) -> tuple[int, bytes]:
    """A file's size, and its last byte that is no white space."""
    size = file.stat().st_size
    with file.open("rb") as stream:
        stream.seek(max(0, size - 64))
        return size, stream.read().rstrip()[-1:]


def _json_faults(path: Path, names: list[str]) -> list[str]:
    faults: list[str] = []
    for name in _SMALL_JSON:
        if name in names:
            try:
                read_json_object(path / name, _MAX_SMALL_BYTES)
            except WeightFault as fault:
                faults += fault.faults
    return faults


def _weight_faults(path: Path, names: list[str]) -> list[str]:
    shards = [name for name in names if name.endswith(".safetensors")]
    pickled = [name for name in names if name.endswith(_PICKLED)]
    if not shards and pickled:
        return [
            f"only pickled weights ({', '.join(pickled[:3])}) in {path}, which can run code when loaded; "
            "convert them to safetensors: where you trust their origin, load the model with transformers and "
            "call its save_pretrained(..., safe_serialization=True)"
        ]
    if not shards:
        return [f"no *.safetensors file in {path}{did_you_mean('model.safetensors', names)}"]
    unreadable = [wrong for name in shards if (wrong := path_fault(path / name, "file"))]
    if unreadable:
        return unreadable
    try:
        tensors = read_weights(path)
        if "config.json" in names:
            read_quantisation(path, tensors)
    except WeightFault as fault:
        return list(fault.faults)
    return []


def _check_model_config(path: Path, given: str, names: list[str], values: Values, report: Report) -> None:
    file = path / "config.json"
    allowed = f"a model's config.json in {path}"
    if "config.json" not in names:
        report.refuse(
            _WEIGHT_PATH, given, f"no such file: {file}{did_you_mean('config.json', names)}", allowed
        )
        return
    if wrong := path_fault(file, "file"):
        report.refuse(_WEIGHT_PATH, given, wrong, allowed)
        return
    try:
        config = read_json_object(file, _MAX_SMALL_BYTES)
    except WeightFault as fault:
        report.refuse(_WEIGHT_PATH, given, str(fault), allowed)
        return
    for wrong in _model_config_faults(config):
        report.refuse(_WEIGHT_PATH, given, f"{file}: {wrong}", allowed)
    longest, seq_len = config.get("max_position_embeddings"), f"{DEPLOY}.maxSeqLen"
    if isinstance(longest, int) and values.has(seq_len) and values.integer(seq_len) > longest:
        report.warn(
            f"{seq_len}={values.integer(seq_len)}: longer than the model's "
            f"max_position_embeddings={longest}; texts beyond that lose accuracy"
        )


def _model_config_faults(config: Mapping[str, Any]) -> list[str]:
    faults = []
    if not isinstance(config.get("model_type"), str):
        faults.append('no string "model_type"')
    vocab_size = config.get("vocab_size", config.get("padded_vocab_size"))
    if type(vocab_size) is not int or vocab_size < 1:
        faults.append('no positive "vocab_size"')
    if not isinstance(config.get("torch_dtype", config.get("dtype")), str):
        faults.append('no string "torch_dtype"')
    if config.get("quantization_config"):
        faults.append(
            '"quantization_config" is not supported; quantised weights are read with "quantize" and a '
            "quant_model_description.json"
        )
    return faults
