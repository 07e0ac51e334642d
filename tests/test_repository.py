"""The repository keeps its own rules: notebooks, import direction, package contents, pins.

Each check is a function from its subject to a list of problems, so that it is also tested on a bad example.
"""
import ast, json, re, shutil, subprocess, sys, zipfile
from pathlib import Path

import nbformat, papermill, pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import check_sync

if sys.version_info >= (3, 11): import tomllib
else: import tomli as tomllib

ROOT = Path(__file__).resolve().parents[1]
NBS = ROOT / "nbs"
NOTEBOOKS = [o for o in sorted(NBS.glob("**/*.ipynb")) if ".ipynb_checkpoints" not in o.parts]
EXPERIMENTS = [o for o in NOTEBOOKS if o.parent.name == "experiments"]
MODULES = sorted(o for o in (ROOT / "klrb").glob("**/*.py") if o.stem not in ("__init__", "_modidx"))
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())


def found(paths: list) -> list:
    "One test parameter per path; while there is none, one that passes after checking that nothing is there"
    return [pytest.param(o, id=str(o.relative_to(ROOT))) for o in paths] or [pytest.param(None, id="none yet")]


def source(nb) -> str: return "\n".join(o.source for o in nb.cells)


# ---- notebooks ----

def anatomy_problems(nb, name: str) -> list:
    "`name` is the path relative to nbs/"
    problems, text = [], "\n".join(o.source for o in nb.cells[:3] if o.cell_type == "markdown")
    if not re.search(r"^# \S", text, re.M): problems.append("no H1 at the top")
    if not re.search(r"^> \S", text, re.M): problems.append("no `>` summary line at the top")
    exports = re.findall(r"^#\|\s*default_exp\s+(\S+)", source(nb), re.M)
    folder, _, file = name.rpartition("/")
    if folder == "experiments" or name == "index.ipynb":
        if exports or re.search(r"^#\|\s*export", source(nb), re.M): problems.append("exports; only modules do")
    else:
        match = re.fullmatch(r"\d\d_([a-z][a-z0-9_]*)\.ipynb", file)
        if folder or not match:
            problems.append("neither nbs/NN_topic.ipynb nor nbs/index.ipynb nor under nbs/experiments/")
        elif exports != [match[1]]: problems.append(f"default_exp is {exports}, must be one `{match[1]}`")
    if nb.cells and nb.cells[0].cell_type == "raw" and "skip_exec" in nb.cells[0].source:
        problems.append("skip_exec hides it from nbdev_test")
    if (nb.metadata.get("kernelspec") or {}).get("language", "python") != "python":
        problems.append("kernel is not Python, which hides it from nbdev_test")
    return problems


MACHINE_PATH = re.compile(r"(?<![\w.:/~-])(?:/(?:root|home|tmp|work|Users|mnt|opt|private|var|content)/|[A-Z]:\\)[\w.~-]")
PROGRESS = re.compile(r"\d+%\|| \d+/\d+ \[|\d(?:it/s|s/it)\b|\r")
TRACEBACK = re.compile(r"Traceback \(most recent call last\)|-{40,}\s*\n\w*(?:Error|Exception)\b")
CLOCK = re.compile(r"\b20\d\d-\d\d-\d\d[ T]\d\d:\d\d|\b\d\d:\d\d:\d\d\b")


def output_text(output) -> str:
    "All text a reader could see, from streams and from every textual MIME type"
    data = output.get("data", {})
    parts = [output.get("text", "")] + [o for k, o in data.items() if k.startswith("text/") or k == "image/svg+xml"]
    return "\n".join("".join(o) for o in parts)


def output_problems(nb) -> list:
    problems = []
    for i, cell in enumerate(nb.cells):
        if MACHINE_PATH.search(cell.source): problems.append(f"cell {i}: machine path in the source")
        outputs = cell.get("outputs", [])
        size = len(json.dumps(outputs))
        if size > 200_000: problems.append(f"cell {i}: outputs of {size / 1000:.0f} kB, at most 200 are allowed")
        for output in outputs:
            text = re.sub(r"\x1b\[[0-9;]*m", "", output_text(output))
            if output.output_type == "error" or TRACEBACK.search(text): problems.append(f"cell {i}: a traceback")
            if MACHINE_PATH.search(text): problems.append(f"cell {i}: machine path {MACHINE_PATH.search(text)[0]!r}")
            if PROGRESS.search(text) or "application/vnd.jupyter.widget-view+json" in output.get("data", {}):
                problems.append(f"cell {i}: a progress bar")
            if CLOCK.search(re.sub(r"<dc:date>.*?</dc:date>", "", text)): problems.append(f"cell {i}: a clock time")
    return problems


def parameter_problems(path: Path) -> list:
    "Without its one tagged cell papermill injects above our defaults, which then win"
    nb = nbformat.read(path, as_version=4)
    cells = [o for o in nb.cells if "parameters" in o.metadata.get("tags", [])]
    if len(cells) != 1: return [f"{len(cells)} cells tagged `parameters`, must be one"]
    problems, names = [], []
    for node in ast.parse(cells[0].source).body:
        if not (isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name) and node.value is not None):
            problems.append(f"`{ast.unparse(node)}` is not `name: type = value  # comment`")
        else: names.append(node.target.id)
    seen = papermill.inspect_notebook(str(path))
    if lost := [o for o in names if o not in seen]: problems.append(f"papermill does not see {lost}")
    problems += [f"`{o}` has no comment" for o in names if o in seen and not seen[o]["help"].strip()]
    if not names: problems.append("no parameters")
    return problems


@pytest.mark.parametrize("path", found(NOTEBOOKS))
def test_notebook_anatomy_and_outputs(path):
    if path is None: return test_no_notebook_is_hidden_from_nbdev_test()
    nb = nbformat.read(path, as_version=4)
    size = path.stat().st_size
    problems = anatomy_problems(nb, path.relative_to(NBS).as_posix()) + output_problems(nb)
    if size > 1_500_000: problems.append(f"notebook of {size / 1000:.0f} kB, at most 1,500 are allowed")
    assert not problems


@pytest.mark.parametrize("path", found(EXPERIMENTS))
def test_experiment_parameters(path):
    if path is None:
        assert not list((NBS / "experiments").glob("**/*.ipynb"))
        return
    assert not parameter_problems(path)


def test_no_notebook_is_hidden_from_nbdev_test():
    hidden = [o for o in NBS.glob("**/*.ipynb") if ".ipynb_checkpoints" not in o.parts
              and any(p.startswith(("_", ".")) for p in o.relative_to(NBS).parts)]
    assert not hidden + list(NBS.glob("**/.notest"))


def test_anatomy_check_finds_problems():
    good = [new_code_cell("#| default_exp steps"), new_markdown_cell("# Steps\n\n> Exact sums are cheap.")]
    assert anatomy_problems(new_notebook(cells=good), "01_steps.ipynb") == []
    assert len(anatomy_problems(new_notebook(), "01_steps.ipynb")) == 3
    assert "must be one `exact`" in anatomy_problems(new_notebook(cells=good), "00_exact.ipynb")[0]
    assert "only modules do" in anatomy_problems(new_notebook(cells=good), "experiments/rloo.ipynb")[0]
    assert "neither" in anatomy_problems(new_notebook(cells=good), "steps.ipynb")[0]


@pytest.mark.parametrize("text, problem", [
    ("saved to /home/someone/run", "machine path"), ("File '/tmp/x.csv'", "machine path"),
    ("Traceback (most recent call last):\n ...", "traceback"), ("100%|#####| 3/3 [00:01<00:00, 2.5it/s]", "progress bar"),
    ("step 1\rstep 2", "progress bar"), ("started 2026-01-02 10:11", "clock time"), ("x" * 200_001, "200 are allowed")])
def test_output_check_finds_problems(text, problem):
    cell = lambda text: new_notebook(cells=[new_code_cell("1", outputs=[new_output("stream", text=text)])])
    assert problem in output_problems(cell(text))[0]
    assert not output_problems(cell("k3/k1 0.28 in 3 s; https://arxiv.org/home/x; ../outputs/tmp/x; 50% | 3"))


@pytest.mark.parametrize("tag, text, problem", [
    ("parameters", "beta: float = 0.1  # weight of the KL term", None),
    ("other", "beta: float = 0.1  # weight", "0 cells tagged"),
    ("parameters", "beta: float = 0.1", "no comment"),
    ("parameters", "import os", "is not `name: type"),
    ("parameters", 'beta: str = "a=b"  # two equal signs; papermill drops such a name', "does not see")])
def test_parameter_check_finds_problems(tmp_path, tag, text, problem):
    metadata = {"kernelspec": {"name": "python3", "language": "python", "display_name": "python3"}}
    cell = new_code_cell(text, metadata={"tags": [tag]})
    nbformat.write(new_notebook(cells=[cell], metadata=metadata), tmp_path / "nb.ipynb")
    problems = parameter_problems(tmp_path / "nb.ipynb")
    assert problem in problems[0] if problem else problems == []


# ---- modules ----

LIBRARY = {"exact": set(), "errors": set(), "adapters": {"errors"}, "gguf_files": {"errors"}, "steps": set(), "estimators": {"steps"}, "gradients": {"steps"}, "update": {"errors", "gradients", "steps"}, "fused": {"steps"}}  # what each may import
STUDY = {"study", "figures"}
# The tool on top: it may use the library, the models, the figures and atomic writes, and nothing but the command line uses it
PARTS = {"sequential": set(), "prompts": {"sources"}, "sources": {"models", "selfcheck"},
         "scoring": {"models", "selfcheck", "sources"},
         "text": {"prompts", "report", "scoring", "sequential", "sources"},
         "report": {"figures", "runs", "sequential"}}
TOOL = PARTS | {"measure": set(PARTS)}


def imported(code: str) -> set:
    "Names of the modules of ours that `code` imports, at any depth of nesting"
    names = set()
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.Import): full = [o.name for o in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = "klrb." * bool(node.level) + (node.module or "")
            full = [base.rstrip(".") + "." + o.name for o in node.names]
        else: continue
        names |= {o.split(".")[1] if "." in o else "klrb" for o in full if o.split(".")[0] in ("klrb", "nbs", "experiments")}
        names |= {"experiments" for o in full if {"nbs", "experiments"} & set(o.split("."))}
    return names - {"__version__"}


def direction_problems(name: str, code: str, number: int) -> list:
    "`number` is that of the notebook: 0x library, 1x pipeline, 2x study"
    names = imported(code)
    if name in LIBRARY: wrong = names - LIBRARY[name]
    elif name in TOOL: wrong = names - TOOL[name] - set(LIBRARY)
    elif number < 10: wrong = names - set(LIBRARY)
    elif number < 20: wrong = names & (STUDY | set(TOOL))
    elif name != "cli": wrong = names & set(TOOL)
    else: wrong = set()
    return [f"klrb.{name} must not import {o}" for o in sorted(wrong | names & {"experiments", name})]


@pytest.mark.parametrize("path", found(MODULES))
def test_module_comes_from_a_notebook_and_imports_one_way(path):
    if path is None:
        assert not [o for o in NOTEBOOKS if o.name[:2].isdigit()], "notebooks, but no module: run `make export`"
        return
    code = path.read_text()
    match = re.search(r"^# AUTOGENERATED! DO NOT EDIT! File to edit: \.\./nbs/((\d\d)_(\w+)\.ipynb)", code, re.M)
    assert match and (NBS / match[1]).exists() and match[3] == path.stem, "not generated from a notebook of its name"
    assert not direction_problems(path.stem, code, int(match[2]))


@pytest.mark.parametrize("name, number, code", [
    ("steps", 1, "from klrb.exact import kl"), ("exact", 0, "from . import steps"), ("gradients", 3, "import klrb.estimators"),
    ("rloo", 15, "def f():\n    from .study import run"), ("dpo", 14, "from klrb import figures"),
    ("study", 20, "from nbs.experiments import rloo"), ("kernels", 4, "from klrb.rloo import train"),
    ("estimators", 2, "from klrb.measure import measure_kl"), ("rloo", 15, "import klrb.scoring"), ("study", 20, "from klrb.report import Saver"),
    ("measure", 5, "from klrb.rloo import train"), ("sources", 7, "from klrb.scoring import draw"), ("report", 22, "import klrb.study")])
def test_import_check_finds_problems(name, number, code):
    assert len(direction_problems(name, code, number)) == 1
    assert not direction_problems("estimators", "import torch\nfrom klrb.steps import k1", 2)


def test_library_imports_without_the_study_stack():
    "In a fresh process, because pytest itself may have loaded any of them"
    names = [o.stem for o in MODULES if o.stem in LIBRARY]
    imports = "; ".join(["import klrb", *(f"import klrb.{o}" for o in names)])
    heavy = ["transformers", "trl", "datasets", "accelerate", "pandas", "sklearn", "scipy", "seaborn", "matplotlib",
             "papermill", "nbdev", "fastcore", "execnb"]
    code = f"{imports}; import sys; print(*[o for o in {heavy} if o in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == ""


# ---- package and pins ----

def test_wheel_holds_the_package_and_nothing_else(tmp_path):
    tree = tmp_path / "tree"
    shutil.copytree(ROOT / "klrb", tree / "klrb", ignore=shutil.ignore_patterns("__pycache__"))
    for name in "pyproject.toml", "LICENSE", "README.md":
        if (ROOT / name).exists(): shutil.copy(ROOT / name, tree)
    code = f"from setuptools import build_meta; build_meta.build_wheel({str(tmp_path)!r})"
    done = subprocess.run([sys.executable, "-c", code], cwd=tree, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (wheel,) = tmp_path.glob("*.whl")
    files = {o for o in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in o}
    ours = {o.relative_to(tree).as_posix() for o in (tree / "klrb").glob("**/*") if o.is_file()}
    assert files == ours and "klrb/py.typed" in files


def test_plain_install_needs_only_torch():
    assert [canonicalize_name(Requirement(o).name) for o in PYPROJECT["project"]["dependencies"]] == ["torch"]


def unpinned(requirements: list, constraints: str, python: str) -> list:
    "Requirements without exactly one pin that satisfies them under this Python version"
    env = {"python_version": python, "python_full_version": python + ".12", "sys_platform": "linux", "extra": ""}
    pins = {}
    for line in constraints.splitlines():
        if not (text := line.partition("#")[0].strip()): continue
        pin = Requirement(text)
        if pin.marker is None or pin.marker.evaluate(env):
            versions = [o.version for o in pin.specifier if o.operator == "=="]
            pins.setdefault(canonicalize_name(pin.name), []).extend(versions or ["unpinned"])
    bad = []
    for o in map(Requirement, requirements):
        if o.marker is not None and not o.marker.evaluate(env): continue
        versions = pins.get(canonicalize_name(o.name), [])
        if len(versions) != 1 or not o.specifier.contains(versions[0]): bad.append(f"{o}: {versions}")
    return bad


@pytest.mark.parametrize("python", ["3.10", "3.11", "3.12"])
def test_constraints_pin_every_requirement(python):
    extras = PYPROJECT["project"]["optional-dependencies"]
    assert {"study", "dev"} <= set(extras)
    wanted = PYPROJECT["project"]["dependencies"] + extras["dev"]
    if python != "3.10": wanted = wanted + [o for k, v in extras.items() if k != "dev" for o in v]  # TRL needs 3.11
    text = (ROOT / "constraints.txt").read_text()
    assert not unpinned(wanted, text, python)
    assert not re.search(r"^(nvidia-|cuda-|triton)|/|@", re.sub(r"#.*", "", text), re.M), "accelerators or addresses"


def test_pin_check_finds_problems():
    text = 'a==1.0 ; python_version < "3.11"\nb==2.0\n'
    assert unpinned(["a>=1", "b"], text, "3.10") == []
    assert len(unpinned(["a>=1", "b>2", "c"], text, "3.11")) == 3


# ---- generated files ----

def test_readme_rendering():
    output = [new_output("stream", text="0.5\n"), new_output("execute_result", data={"text/plain": "3", "text/html": "<b>3</b>"})]
    nb = new_notebook(cells=[
        new_code_cell("#| hide\nimport os"), new_code_cell("#|hide\nimport os"),
        new_markdown_cell("# klrb\n\n> Less noise.\n\n![front](../outputs/published/pocket/figures/pareto.svg) [next](00_exact.ipynb#a)\n"
                          '<img src="../outputs/x.svg"> [paper](https://arxiv.org/abs/2504.10637) [below](#use)'),
        new_code_cell("#| eval: false\n\nprint(0.5)\n1 + 2", outputs=output)])
    text = check_sync.render_readme(nb)
    assert text == check_sync.README_NOTE + (
        "# klrb\n\n> Less noise.\n\n![front](outputs/published/pocket/figures/pareto.svg) [next](nbs/00_exact.ipynb#a)\n"
        '<img src="outputs/x.svg"> [paper](https://arxiv.org/abs/2504.10637) [below](#use)\n\n'
        "```python\nprint(0.5)\n1 + 2\n```\n\n```text\n0.5\n```\n\n```text\n3\n```\n")
    image = new_output("display_data", data={"image/png": "aaaa", "text/plain": "<Figure>"})
    with pytest.raises(ValueError, match="link the saved file"):
        check_sync.render_readme(new_notebook(cells=[new_code_cell("plot()", outputs=[image])]))


def test_readme_is_current_and_its_links_resolve():
    assert check_sync.readme(check=True) == ""
    if not (ROOT / "README.md").exists(): return
    text = re.sub(r"```.*?```", "", (ROOT / "README.md").read_text(encoding="utf-8"), flags=re.S)
    links = re.findall(r"""\]\(\s*([^)\s]+)|\b(?:src|href)=["']([^"']+)""", text)
    local = [o for pair in links for o in pair if o and not re.match(r"[a-z][a-z0-9+.-]*:|#", o, re.I)]
    assert not [o for o in local if not (ROOT / o.partition("#")[0]).exists()]


def test_diff_shows_every_change():
    assert check_sync.diff({"a": "1\n"}, {"a": "1\n"}) == ""
    shown = check_sync.diff({"a": "1\n", "b": "x"}, {"a": "2\n", "b": "x\n", "c": ""})
    assert "-1\n+2" in shown and "b: white space differs" in shown and "c: did not exist" in shown
