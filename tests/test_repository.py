"""The repository keeps its own rules: notebooks, import direction, package contents, pins.

Each check is a function from its subject to a list of problems, so that it is also tested on a bad
example.
"""

import ast
import io
import json
import os
import re
import shutil
import subprocess
import sys
import tokenize
import zipfile
from pathlib import Path

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import check_sync

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).resolve().parents[1]
NBS = ROOT / "nbs"
NOTEBOOKS = [o for o in sorted(NBS.glob("**/*.ipynb")) if ".ipynb_checkpoints" not in o.parts]
EXPERIMENTS = [o for o in NOTEBOOKS if o.parent.name == "experiments"]
MODULES = sorted(
    o for o in (ROOT / "klrb").glob("**/*.py") if o.stem not in ("__init__", "__main__", "_modidx")
)
PARTS = (
    "ground",
    "theory",
    "kernels",
    "judge",
    "compare",
    "rlhf",
    "sweeps",
    "results",
    "exercises",
)  # in the reader's order
SILENT = ("theory", "judge", "results", "exercises")  # parts whose chapters may export nothing
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())


def found(paths: list) -> list:
    "One test parameter per path; while there is none, one that passes if nothing is there"
    return [pytest.param(o, id=str(o.relative_to(ROOT))) for o in paths] or [
        pytest.param(None, id="none yet")
    ]


def source(nb) -> str:
    return "\n".join(o.source for o in nb.cells)


# ---- notebooks ----


def anatomy_problems(nb, name: str) -> list:
    "`name` is the path relative to nbs/"
    problems, text = [], "\n".join(o.source for o in nb.cells[:3] if o.cell_type == "markdown")
    if not re.search(r"^# \S", text, re.M):
        problems.append("no H1 at the top")
    if not re.search(r"^> \S", text, re.M):
        problems.append("no `>` summary line at the top")
    exports = re.findall(r"^#\|\s*default_exp\s+(\S+)", source(nb), re.M)
    folder, _, file = name.rpartition("/")
    if folder in ("experiments", "results") or name == "index.ipynb":
        if exports or re.search(r"^#\|\s*export", source(nb), re.M):
            problems.append("exports; only modules do")
    else:
        match = re.fullmatch(r"\d\d\d_[a-z][a-z0-9_]*\.ipynb", file)
        if folder not in PARTS or not match:
            problems.append("neither nbs/PART/NNN_topic.ipynb nor nbs/index.ipynb")
        elif (
            folder not in SILENT
            and not exports
            and not re.search(r"^#\|\s*export \w", source(nb), re.M)
            and not file.endswith(("_guide.ipynb", "_own_loop.ipynb"))  # show what can be done
        ):
            problems.append("exports nothing, though its part is a part of the library")
    if nb.cells and nb.cells[0].cell_type == "raw" and "skip_exec" in nb.cells[0].source:
        problems.append("skip_exec hides it from nbdev_test")
    if (nb.metadata.get("kernelspec") or {}).get("language", "python") != "python":
        problems.append("kernel is not Python, which hides it from nbdev_test")
    return problems


MACHINE_PATH = re.compile(
    r"(?<![\w.:/~-])(?:/(?:root|home|tmp|work|Users|mnt|opt|private|var|content)/|[A-Z]:\\)[\w.~-]"
)
PROGRESS = re.compile(r"\d+%\|| \d+/\d+ \[|\d(?:it/s|s/it)\b|\r")
TRACEBACK = re.compile(r"Traceback \(most recent call last\)|-{40,}\s*\n\w*(?:Error|Exception)\b")
CLOCK = re.compile(r"\b20\d\d-\d\d-\d\d[ T]\d\d:\d\d|\b\d\d:\d\d:\d\d\b")


def output_text(output) -> str:
    "All text a reader could see, from streams and from every textual MIME type"
    data = output.get("data", {})
    parts = [output.get("text", "")] + [
        o for k, o in data.items() if k.startswith("text/") or k == "image/svg+xml"
    ]
    return "\n".join("".join(o) for o in parts)


def output_problems(nb) -> list:
    problems = []
    for i, cell in enumerate(nb.cells):
        if MACHINE_PATH.search(cell.source):
            problems.append(f"cell {i}: machine path in the source")
        outputs = cell.get("outputs", [])
        size = len(json.dumps(outputs))
        if size > 200_000:
            problems.append(f"cell {i}: outputs of {size / 1000:.0f} kB, at most 200 are allowed")
        for output in outputs:
            text = re.sub(r"\x1b\[[0-9;]*m", "", output_text(output))
            if output.output_type == "error" or TRACEBACK.search(text):
                problems.append(f"cell {i}: a traceback")
            if MACHINE_PATH.search(text):
                problems.append(f"cell {i}: machine path {MACHINE_PATH.search(text)[0]!r}")
            if PROGRESS.search(text) or "application/vnd.jupyter.widget-view+json" in output.get(
                "data", {}
            ):
                problems.append(f"cell {i}: a progress bar")
            if CLOCK.search(re.sub(r"<dc:date>.*?</dc:date>", "", text)):
                problems.append(f"cell {i}: a clock time")
    return problems


def parameter_problems(path: Path) -> list:
    "Without its one tagged cell papermill injects above our defaults, which then win"
    nb = nbformat.read(path, as_version=4)
    cells = [o for o in nb.cells if "parameters" in o.metadata.get("tags", [])]
    if len(cells) != 1:
        return [f"{len(cells)} cells tagged `parameters`, must be one"]
    tokens = tokenize.generate_tokens(io.StringIO(cells[0].source).readline)
    commented = {o.start[0] for o in tokens if o.type == tokenize.COMMENT}
    body = ast.parse(cells[0].source).body
    problems = [] if body else ["no parameters"]
    for node in body:
        if not (
            isinstance(node, ast.AnnAssign)
            and isinstance(node.target, ast.Name)
            and node.value is not None
        ):
            problems.append(f"`{ast.unparse(node)}` is not `name: type = value  # comment`")
        elif not commented & set(range(node.lineno, node.end_lineno + 1)):
            problems.append(f"`{node.target.id}` has no comment")
    return problems


COMPOUND = re.compile(r"^\s*(if|for|while|with|try|else|elif|except|finally)\b[^#\"']*:\s+[^#\s]")


def form_problems(nb) -> list:
    "What ruff does not see in a notebook, or sees only where it reads Python"
    problems = []
    for i, cell in enumerate(nb.cells):
        if cell.cell_type != "code":
            continue
        for line in cell.source.splitlines():
            if len(line) > 100:
                problems.append(f"cell {i}: a line of {len(line)} columns")
            if COMPOUND.match(line):
                problems.append(f"cell {i}: `{line.strip()}` is two statements")
        if prose := formatted_prose(cell.source):
            problems.append(f"cell {i}: prose in an f-string, {prose[0][:40]}")
    return problems


def formatted_prose(code: str) -> list:
    "Markdown or HTML that code puts together: a sentence is written, its numbers are checked"
    try:
        tree = ast.parse("\n".join(o for o in code.splitlines() if not o.startswith(("%", "!"))))
    except SyntaxError:
        return []
    calls = [o for o in ast.walk(tree) if isinstance(o, ast.Call)]
    shown = [o for o in calls if re.search(r"(?i)markdown$", ast.unparse(o.func))]
    inside = [o for call in shown for value in call.args for o in ast.walk(value)]
    return [ast.unparse(o) for o in inside if isinstance(o, ast.JoinedStr)]


@pytest.mark.parametrize("path", found(NOTEBOOKS))
def test_notebook_anatomy_and_outputs(path):
    if path is None:
        return test_no_notebook_is_hidden_from_nbdev_test()
    nb = nbformat.read(path, as_version=4)
    size = path.stat().st_size
    problems = anatomy_problems(nb, path.relative_to(NBS).as_posix()) + output_problems(nb)
    if size > 1_500_000:
        problems.append(f"notebook of {size / 1000:.0f} kB, at most 1,500 are allowed")
    assert not problems


@pytest.mark.parametrize("path", found(NOTEBOOKS))
def test_notebook_form(path):
    assert not form_problems(nbformat.read(path, as_version=4))


@pytest.mark.parametrize("path", found(EXPERIMENTS))
def test_experiment_parameters(path):
    if path is None:
        assert not list((NBS / "experiments").glob("**/*.ipynb"))
        return
    assert not parameter_problems(path)


@pytest.mark.parametrize("path", found(NOTEBOOKS))
def test_no_notebook_leaves_a_default_type_behind(path):
    "nbdev_test runs several notebooks in one process: the next one would compute in float64"
    set_to = re.findall(r"set_default_dtype\(([\w.]+)\)", source(nbformat.read(path, as_version=4)))
    assert not set_to or set_to[-1] == "torch.float32"


def test_no_notebook_is_hidden_from_nbdev_test():
    hidden = [
        o
        for o in NBS.glob("**/*.ipynb")
        if ".ipynb_checkpoints" not in o.parts
        and any(p.startswith(("_", ".")) for p in o.relative_to(NBS).parts)
    ]
    assert not hidden + list(NBS.glob("**/.notest"))


def test_anatomy_check_finds_problems():
    text = new_markdown_cell("# Steps\n\n> Exact sums are cheap.")
    good = new_notebook(cells=[new_code_cell("#| default_exp steps"), text])
    assert anatomy_problems(good, "theory/101_steps.ipynb") == []
    assert len(anatomy_problems(new_notebook(), "rlhf/501_steps.ipynb")) == 3
    assert len(anatomy_problems(new_notebook(), "theory/101_steps.ipynb")) == 2
    assert "only modules do" in anatomy_problems(good, "experiments/rloo.ipynb")[0]
    assert "only modules do" in anatomy_problems(good, "results/701_rloo.ipynb")[0]
    assert "neither" in anatomy_problems(good, "101_steps.ipynb")[0]
    assert anatomy_problems(new_notebook(cells=[text]), "theory/101_steps.ipynb") == []
    assert "nothing" in anatomy_problems(new_notebook(cells=[text]), "rlhf/501_steps.ipynb")[0]


@pytest.mark.parametrize(
    "code, problem",
    [
        ("x = 1" + " " * 96 + "# far", "a line of 106 columns"),
        ("if x: y = 1", "two statements"),
        ("try: y = 1\nexcept ValueError: pass", "two statements"),
        ('Markdown(f"RB is {x} times better.")', "prose in an f-string"),
        ('display(IPython.display.Markdown("RB " + f"is {x}."))', "prose in an f-string"),
        ('%matplotlib inline\nMarkdown(f"""RB is\n{x}.""")', "prose in an f-string"),
    ],
)
def test_form_check_finds_problems(code, problem):
    assert problem in form_problems(new_notebook(cells=[new_code_cell(code)]))[0]
    good = 'if x:  # why\n    print(f"{x:.2f}")\nMarkdown(table.to_markdown())'
    assert form_problems(new_notebook(cells=[new_code_cell(good), new_markdown_cell(code)])) == []


def test_no_two_chapters_share_a_number():
    "The reader's order is the file order"
    numbers = [o.name[:3] for o in NOTEBOOKS if o.name[:2].isdigit()]
    assert len(numbers) == len(set(numbers))
    parts = {part: sorted(int(o.name[:3]) for o in (NBS / part).glob("*.ipynb")) for part in PARTS}
    ends = [(found[0], found[-1]) for found in parts.values()]
    assert all(last < first for (_, last), (first, _) in zip(ends, ends[1:]))


@pytest.mark.parametrize(
    "text, problem",
    [
        ("saved to /home/someone/run", "machine path"),
        ("File '/tmp/x.csv'", "machine path"),
        ("Traceback (most recent call last):\n ...", "traceback"),
        ("100%|#####| 3/3 [00:01<00:00, 2.5it/s]", "progress bar"),
        ("step 1\rstep 2", "progress bar"),
        ("started 2026-01-02 10:11", "clock time"),
        ("x" * 200_001, "200 are allowed"),
    ],
)
def test_output_check_finds_problems(text, problem):
    def cell(text):
        outputs = [new_output("stream", text=text)]
        return new_notebook(cells=[new_code_cell("1", outputs=outputs)])

    assert problem in output_problems(cell(text))[0]
    assert not output_problems(
        cell("k3/k1 0.28 in 3 s; https://arxiv.org/home/x; ../outputs/tmp/x; 50% | 3")
    )


@pytest.mark.parametrize(
    "tag, text, problem",
    [
        ("parameters", "beta: float = 0.1  # weight of the KL term", None),
        ("other", "beta: float = 0.1  # weight", "0 cells tagged"),
        ("parameters", "beta: float = 0.1", "no comment"),
        ("parameters", "import os", "is not `name: type"),
        ("parameters", 'beta: str = "a#b"', "no comment"),
        ("parameters", 'beta: str = "a=b"  # x = y, as Python reads it', None),
        ("parameters", "beta: float = (\n    0.1  # weight\n)", None),
        ("parameters", "", "no parameters"),
    ],
)
def test_parameter_check_finds_problems(tmp_path, tag, text, problem):
    metadata = {"kernelspec": {"name": "python3", "language": "python", "display_name": "python3"}}
    cell = new_code_cell(text, metadata={"tags": [tag]})
    nbformat.write(new_notebook(cells=[cell], metadata=metadata), tmp_path / "nb.ipynb")
    problems = parameter_problems(tmp_path / "nb.ipynb")
    assert problem in problems[0] if problem else problems == []


# ---- modules ----


@pytest.mark.parametrize("path", found(MODULES))
def test_module_comes_from_a_notebook(path):
    made = re.search(
        r"^# AUTOGENERATED! DO NOT EDIT! File to edit: (\S+\.ipynb)", path.read_text(), re.M
    )
    notebook = (path.parent / made[1]).resolve()
    assert notebook.is_file() and NBS in notebook.parents


def test_imports_run_one_way():
    "The contracts are in pyproject.toml; the layers are the parts of the book"
    lint = Path(sys.executable).parent / "lint-imports"
    done = subprocess.run(
        [sys.executable, lint, "--no-cache"], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_contract_finds_an_import_that_runs_up(tmp_path):
    shutil.copytree(
        ROOT / "klrb", tmp_path / "klrb", ignore=shutil.ignore_patterns("assets", "__pycache__")
    )
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    with (tmp_path / "klrb" / "models.py").open("a") as file:
        file.write("\nfrom klrb.rlhf import profiles\n")
    lint = Path(sys.executable).parent / "lint-imports"
    env = os.environ | dict(PYTHONPATH=str(tmp_path))
    command = [sys.executable, lint, "--no-cache"]
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.returncode == 1 and "one way BROKEN" in done.stdout, done.stdout
    upwards = r"klrb\.models -> klrb\.rlhf(\.profiles)? \(l\.\d+\)"
    assert re.search(upwards, done.stdout), done.stdout


LIBRARY = (
    *("exact", "steps", "estimators", "gradients", "fused", "update"),
    *("errors", "style", "libraries", "exercises"),
)


def test_library_imports_without_the_study_stack():
    "In a fresh process, because pytest itself may have loaded any of them"
    names = [o for o in LIBRARY if (ROOT / "klrb" / f"{o}.py").is_file()]
    imports = "; ".join(["import klrb", *(f"import klrb.{o}" for o in names)])
    heavy = [
        "transformers",
        "trl",
        "datasets",
        "accelerate",
        "pandas",
        "sklearn",
        "scipy",
        "seaborn",
        "matplotlib",
        "papermill",
        "nbdev",
        "fastcore",
        "execnb",
    ]
    code = f"{imports}; import sys; print(*[o for o in {heavy} if o in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == ""


# ---- package and pins ----


def test_wheel_holds_the_package_and_nothing_else(tmp_path):
    tree = tmp_path / "tree"
    shutil.copytree(ROOT / "klrb", tree / "klrb", ignore=shutil.ignore_patterns("__pycache__"))
    for name in "pyproject.toml", "LICENSE", "README.md":
        if (ROOT / name).exists():
            shutil.copy(ROOT / name, tree)
    code = f"from setuptools import build_meta; build_meta.build_wheel({str(tmp_path)!r})"
    done = subprocess.run([sys.executable, "-c", code], cwd=tree, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (wheel,) = tmp_path.glob("*.whl")
    files = {o for o in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in o}
    ours = {o.relative_to(tree).as_posix() for o in (tree / "klrb").glob("**/*") if o.is_file()}
    assert files == ours and "klrb/py.typed" in files


def test_plain_install_needs_only_torch():
    assert [
        canonicalize_name(Requirement(o).name) for o in PYPROJECT["project"]["dependencies"]
    ] == ["torch"]


def unpinned(requirements: list, constraints: str, python: str) -> list:
    "Requirements without exactly one pin that satisfies them under this Python version"
    env = {
        "python_version": python,
        "python_full_version": python + ".12",
        "sys_platform": "linux",
        "extra": "",
    }
    pins = {}
    for line in constraints.splitlines():
        if not (text := line.partition("#")[0].strip()):
            continue
        pin = Requirement(text)
        if pin.marker is None or pin.marker.evaluate(env):
            versions = [o.version for o in pin.specifier if o.operator == "=="]
            pins.setdefault(canonicalize_name(pin.name), []).extend(versions or ["unpinned"])
    bad = []
    for o in map(Requirement, requirements):
        if o.marker is not None and not o.marker.evaluate(env):
            continue
        versions = pins.get(canonicalize_name(o.name), [])
        if len(versions) != 1 or not o.specifier.contains(versions[0]):
            bad.append(f"{o}: {versions}")
    return bad


@pytest.mark.parametrize("python", ["3.10", "3.11", "3.12"])
def test_constraints_pin_every_requirement(python):
    extras = PYPROJECT["project"]["optional-dependencies"]
    assert {"study", "dev"} <= set(extras)
    wanted = PYPROJECT["project"]["dependencies"] + extras["dev"]
    if python != "3.10":
        wanted = wanted + [o for k, v in extras.items() if k != "dev" for o in v]  # TRL needs 3.11
    text = (ROOT / "constraints.txt").read_text()
    assert not unpinned(wanted, text, python)
    assert not re.search(r"^(nvidia-|cuda-|triton)|/|@", re.sub(r"#.*", "", text), re.M), (
        "accelerators or addresses"
    )


def test_pin_check_finds_problems():
    text = 'a==1.0 ; python_version < "3.11"\nb==2.0\n'
    assert unpinned(["a>=1", "b"], text, "3.10") == []
    assert len(unpinned(["a>=1", "b>2", "c"], text, "3.11")) == 3


# ---- generated files ----


def test_readme_rendering():
    output = [
        new_output("stream", text="0.5\n"),
        new_output("execute_result", data={"text/plain": "3", "text/html": "<b>3</b>"}),
    ]
    nb = new_notebook(
        cells=[
            new_code_cell("#| hide\nimport os"),
            new_code_cell("#|hide\nimport os"),
            new_markdown_cell(
                "# klrb\n\n> Less noise.\n\n"
                "![front](../outputs/published/pareto.svg) [next](judge/301_tabular.ipynb#a)\n"
                '<img src="../outputs/x.svg"> [paper](https://arxiv.org/abs/2504) [below](#use)'
            ),
            new_code_cell("#| eval: false\n\nprint(0.5)\n1 + 2", outputs=output),
        ]
    )
    text = check_sync.render_readme(nb)
    assert text == check_sync.README_NOTE + (
        "# klrb\n\n> Less noise.\n\n"
        "![front](outputs/published/pareto.svg) [next](nbs/judge/301_tabular.ipynb#a)\n"
        '<img src="outputs/x.svg"> [paper](https://arxiv.org/abs/2504) [below](#use)\n\n'
        "```python\nprint(0.5)\n1 + 2\n```\n\n```text\n0.5\n```\n\n```text\n3\n```\n"
    )
    image = new_output("display_data", data={"image/png": "aaaa", "text/plain": "<Figure>"})
    with pytest.raises(ValueError, match="link the saved file"):
        check_sync.render_readme(new_notebook(cells=[new_code_cell("plot()", outputs=[image])]))


def test_readme_is_current_and_its_links_resolve():
    assert check_sync.readme(check=True) == ""
    if not (ROOT / "README.md").exists():
        return
    text = re.sub(r"```.*?```", "", (ROOT / "README.md").read_text(encoding="utf-8"), flags=re.S)
    links = re.findall(r"""\]\(\s*([^)\s]+)|\b(?:src|href)=["']([^"']+)""", text)
    local = [
        o for pair in links for o in pair if o and not re.match(r"[a-z][a-z0-9+.-]*:|#", o, re.I)
    ]
    assert not [o for o in local if not (ROOT / o.partition("#")[0]).exists()]


def test_diff_shows_every_change():
    assert check_sync.diff({"a": "1\n"}, {"a": "1\n"}) == ""
    shown = check_sync.diff({"a": "1\n", "b": "x"}, {"a": "2\n", "b": "x\n", "c": ""})
    assert "-1\n+2" in shown and "b: white space differs" in shown and "c: did not exist" in shown
