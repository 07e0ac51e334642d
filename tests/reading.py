"""What a reader sees in nbs/experiments: the published runs, rendered from their tables.

python tests/reading.py             outputs into nbs/experiments, pictures into outputs/published
python tests/reading.py figures     nbs/results: the README's pictures, outputs/published/figures
python tests/reading.py add FOLDER  runs that rloo.ipynb wrote into FOLDER, into the pocket study
"""

import json
import os
import shutil
import sys
import tempfile
from pathlib import Path

import nbformat
import pandas as pd
from nbclient import NotebookClient

ROOT = Path(__file__).resolve().parents[1]
EXPERIMENTS, PUBLISHED = ROOT / "nbs" / "experiments", ROOT / "outputs" / "published"
NAMES = ("prepare", "variance", "steps", "rloo", "pareto", "ceiling", "plateau")
RUN = "rb-beta0.5-seed0"  # the run that rloo.ipynb shows: the notebook's own defaults


def restore_runs(study: Path, folder: Path) -> None:
    "The folders that `rloo.ipynb` wrote, without the completions, from the two tables of a study."
    runs = pd.read_csv(study / "rloo" / "runs.csv").set_index("folder").drop(columns="bytes")
    units = json.loads((study / "rloo" / "settings.json").read_text())["units"]
    metrics = pd.read_csv(study / "rloo" / "metrics.csv", dtype={"folder": str})
    for name, rows in metrics.groupby("folder"):
        (folder / name).mkdir(parents=True)
        result = json.loads(runs.loc[name].to_json())
        long = rows.drop(columns="folder").melt("step", var_name="metric").dropna()
        what = {o: result[o] for o in ("kl_estimator", "seed", "start", "beta")}
        long = long.sort_values("step", kind="stable").assign(unit=long.metric.map(units), **what)
        long.to_csv(folder / name / "metrics.csv", index=False)
        for file in ("params.json", "result.json"):
            (folder / name / file).write_text(json.dumps(result))


def add_runs(study: Path, folder: Path) -> None:
    "The finished runs of a folder into the two tables of a study: undoes `restore_runs`."
    old, curves = (pd.read_csv(study / "rloo" / f"{o}.csv", dtype=str) for o in ("runs", "metrics"))
    runs, metrics = [old], [curves]
    for path in sorted(folder.glob("*/result.json")):
        curve = path.with_name("metrics.csv")
        what = json.loads(path.read_text()) | dict(bytes=curve.stat().st_size)
        name = "{kl_estimator}-beta{beta:g}-seed{seed}".format(**what)
        row = {key: value if isinstance(value, str) else repr(value) for key, value in what.items()}
        runs.append(pd.DataFrame([dict(row, folder=name)])[old.columns])
        wide = pd.read_csv(curve, dtype=str).pivot(index="step", columns="metric", values="value")
        wide = wide.sort_index(key=lambda o: o.astype(int)).reset_index().assign(folder=name)
        metrics.append(wide[curves.columns])
    for name, parts, key in (("runs", runs, ["folder"]), ("metrics", metrics, ["folder", "step"])):
        table = pd.concat(parts).drop_duplicates(key, keep="last")
        table = table.sort_values("folder", kind="stable")
        table.to_csv(study / "rloo" / f"{name}.csv", index=False)


def parameters(name: str, study: str, folder: Path) -> dict:
    "What the notebook is given; `folder` then holds what it reads."
    given = dict(profile=study, out_dir=str(folder))
    if name in ("rloo", "pareto"):
        restore_runs(PUBLISHED / study, folder / "rloo")
    else:
        shutil.copytree(PUBLISHED / study / name, folder, dirs_exist_ok=True)
    if name == "rloo":
        given["out_dir"] = str(folder / "rloo" / RUN)
    if name == "pareto":
        given |= dict(runs_dir=str(folder / "rloo"), prepare_dir=str(PUBLISHED / study / "prepare"))
    return given


def is_rendered(cell, name: str) -> bool:
    "Whether a cell reads tables only. All of pareto does."
    return cell.cell_type == "code" and (
        name == "pareto" or "render" in cell.metadata.get("tags", [])
    )


def render(name: str, study: str, folder: Path) -> nbformat.NotebookNode:
    "An experiment with the outputs of a published run; other cells come without."
    nb = nbformat.read(EXPERIMENTS / f"{name}.ipynb", 4)
    given = parameters(name, study, folder)
    values = "\n".join(f"{key} = {value!r}" for key, value in given.items())
    cells = []
    for cell in nb.cells:
        if cell.cell_type == "code":
            cell.outputs, cell.execution_count = [], None
        if "parameters" in cell.metadata.get("tags", []):
            cells += [cell, nbformat.v4.new_code_cell(values)]
        elif is_rendered(cell, name):
            cells.append(cell)
    small = nbformat.v4.new_notebook(cells=cells, metadata=nb.metadata)
    NotebookClient(small, timeout=300, resources=dict(metadata=dict(path=str(folder)))).execute()
    for cell in cells:
        cell.metadata.pop("execution", None)
        cell.execution_count = None
        for output in cell.outputs:
            if output.output_type == "execute_result":
                output.execution_count = None
    return nb


def written(name: str, folder: Path) -> list[Path]:
    "Pictures, and the tables of pareto, which the tables of its runs determine."
    names = ("runs", "cells", "paired", "spread", "training", "change") if name == "pareto" else ()
    return [*folder.glob("*.png"), *(folder / f"{o}.csv" for o in names)]


def reading() -> None:
    "Outputs of the pocket study into the notebooks; pictures of both studies beside their tables."
    for study in ("pocket", "smol"):
        for name in NAMES if study == "pocket" else ("variance", "steps", "pareto"):
            with tempfile.TemporaryDirectory() as folder:
                nb = render(name, study, Path(folder))
                for file in written(name, Path(folder)):
                    shutil.copy(file, PUBLISHED / study / name)
            if study == "pocket":
                nbformat.write(nb, EXPERIMENTS / f"{name}.ipynb")
            print(f"{study} {name}")


def figures() -> None:
    "The README's pictures, as nbs/results draws them."
    os.environ["KLRB_FIGURES"] = str(PUBLISHED / "figures")
    for path in sorted((ROOT / "nbs" / "results").glob("*.ipynb")):
        nb = nbformat.read(path, 4)
        NotebookClient(
            nb, timeout=300, resources=dict(metadata=dict(path=str(path.parent)))
        ).execute()
        print(path.stem)


if __name__ == "__main__":
    match sys.argv[1:]:
        case []:
            reading()
        case ["figures"]:
            figures()
        case ["add", folder]:
            add_runs(PUBLISHED / "pocket", Path(folder))
        case _:
            sys.exit(__doc__)
