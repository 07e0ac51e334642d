"""The experiments: the whole chain at smoke size, and what is committed of the published runs."""

import contextlib
import json
import os
import re
import select
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

import matplotlib.pyplot as plt
import nbformat
import pandas as pd
import pytest
from nbclient import NotebookClient

import reading

PICTURE_BYTES = 150_000


def by_folder(study, name):
    files = (study / "rloo").glob(f"*/{name}.json")
    return {path.parent.name: json.loads(path.read_text()) for path in files}


def test_the_smoke_study(tmp_path):
    "prepare -> variance -> rloo -> pareto on the random tiny model, through the sweep."
    klrb = [sys.executable, "-c", "from klrb.cli import app; app()"]
    command = [*klrb, "study", "--profile", "smoke", "--seeds", "2", "--out", str(tmp_path)]
    done = subprocess.run(command, cwd=reading.ROOT, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stdout + done.stderr
    results, report = by_folder(tmp_path, "result"), tmp_path / "report"
    assert len(results) == 4

    runs = pd.read_csv(report / "runs.csv").set_index(["kl_estimator", "beta", "seed"])
    for o in results.values():
        shown = runs.loc[(o["kl_estimator"], o["beta"], o["seed"])]
        for name in ("reward", "kl_rb", "objective"):
            assert shown[name] == pytest.approx(o[name], rel=1e-5)
    objective = {(o["kl_estimator"], o["seed"]): o["objective"] for o in results.values()}
    expected = sum(objective["rb", seed] - objective["mc", seed] for seed in (0, 1)) / 2
    paired = pd.read_csv(report / "paired.csv").query("metric == 'objective'")
    assert paired["mean"].tolist() == pytest.approx([expected] * 2, rel=1e-4, abs=1e-6)
    assert (paired.low < paired["mean"]).all() and (paired["mean"] < paired.high).all()

    (variance,) = (tmp_path / "variance").iterdir()
    for stem in ("single_completion", "value", "gradient", "update"):
        assert (variance / f"{stem}.png").is_file() and (variance / f"{stem}.csv").is_file()
    for stem in ("paired", "runs", "training"):
        assert (report / f"{stem}.png").is_file() and (report / f"{stem}.csv").is_file()


AGG = "import matplotlib\n\nmatplotlib.use('Agg')\n"


def test_the_tables_of_pareto_are_those_of_its_published_runs(tmp_path):
    "Also: a report that lacks a run says so on every figure."
    space = dict(reading.parameters("pareto", "smol", tmp_path), start="reference", selection="")
    space["planned"] = 28  # 27 are published
    cells = nbformat.read(reading.EXPERIMENTS / "pareto.ipynb", 4).cells
    cells = [o for o in cells if o.cell_type == "code" and "tags" not in o.metadata]
    plt.close("all")  # of other tests in this process
    exec(AGG + "\n".join(o.source for o in cells), space)
    figures = [space["plt"].figure(i) for i in space["plt"].get_fignums()]
    space["plt"].close("all")
    assert len(figures) == 3
    assert all(o.texts[0].get_text() == "PARTIAL: 27 of 28 runs" for o in figures)
    for table in ("runs", "cells", "paired", "spread", "change", "training"):
        path = reading.PUBLISHED / "smol" / "pareto" / f"{table}.csv"
        ours = pd.read_csv(tmp_path / f"{table}.csv")
        pd.testing.assert_frame_equal(ours, pd.read_csv(path), rtol=1e-4, atol=1e-5)


def test_runs_that_are_added_to_a_study_are_in_its_tables(tmp_path):
    published, study, folder = reading.PUBLISHED / "smol", tmp_path / "study", tmp_path / "runs"
    (study / "rloo").mkdir(parents=True)
    reading.restore_runs(published, folder)
    whole = {o: pd.read_csv(published / "rloo" / f"{o}.csv") for o in ("runs", "metrics")}
    for name, table in whole.items():  # without one method, and with one run that is added again
        rest = table[~table.folder.str.startswith("rb-") | (table.folder == "rb-beta0.1-seed0")]
        rest.to_csv(study / "rloo" / f"{name}.csv", index=False)
    reading.add_runs(study, folder)
    for name, table in whole.items():
        found = pd.read_csv(study / "rloo" / f"{name}.csv")
        assert (found.bytes > 0).all() if name == "runs" else found.step.max() == 60
        kept = [o for o in table if o != "bytes"]
        pd.testing.assert_frame_equal(found[kept], table[kept], check_dtype=False)


SLEEPS = "        import time\n\n        time.sleep(3600)\n"


def test_a_method_that_does_not_finish_is_a_row_of_the_speed_table_without_a_time(tmp_path):
    "The paper's formula sleeps here; the other methods and the table of targets are still made."
    budget, starting = 30, 120  # seconds; two processes and a kernel, on a machine that is busy
    nb = nbformat.read(reading.EXPERIMENTS / "speed.ipynb", 4)
    given = f"\nmethods = 'kl_div paper ours'\nbudget_seconds = {budget}\nout_dir = '{tmp_path}'"
    for cell in nb.cells:
        if "parameters" in cell.metadata.get("tags", []):
            cell.source += given
        if "def from_logits" in cell.source:
            cell.source = re.sub(r"def paper\(.*\n", lambda o: o[0] + SLEEPS, cell.source)
    assert any(SLEEPS in cell.source for cell in nb.cells)
    began = time.monotonic()
    where = dict(metadata=dict(path=str(reading.EXPERIMENTS)))
    NotebookClient(nb, timeout=budget + starting, resources=where).execute()
    assert time.monotonic() - began < budget + starting
    speed = pd.read_csv(tmp_path / "speed.csv").set_index(["method", "passes"])
    slow, rest = speed.loc["paper"], speed.drop("paper")
    assert slow.seconds.isna().all() and (slow.repeats == 0).all()
    limits = slow.note.str.extract(r"not finished in ([\d.]+) s")[0].astype(float)
    assert ((limits > 0) & (limits <= budget / 5 / 2)).all()  # two methods were still to try
    assert len(rest) == 4 and (rest.seconds > 0).all() and rest.note.isna().all()
    targets = pd.read_csv(tmp_path / "targets.csv")
    assert targets.met.tolist() == ["not measured"] * 2 and targets.ratio.isna().all()
    assert targets.note.str.startswith("not finished in").all()
    assert json.loads((tmp_path / "result.json").read_text()) == {}


TAKES_TURNS = """import os, sys
go, done = map(int, sys.argv[1:])
while os.read(go, 1) == b".":
    os.write(done, b".")
    FAULT
os.write(done, b".")
print("RESULT {}")
"""


@pytest.mark.parametrize("slow", ["ours", "stock"])
@pytest.mark.parametrize("fault", ["import time; time.sleep(3600)", "raise OSError('no model')"])
def test_a_trainer_that_does_not_finish_or_fails_ends_the_comparison(slow, fault):
    "Its first step is well, and the other trainer waits for its turn."
    cells = nbformat.read(reading.EXPERIMENTS / "speed.ipynb", 4).cells
    cells = [o.source for o in cells if "def result_of" in o.source or "def in_turns" in o.source]
    space = dict(contextlib=contextlib, json=json, os=os, select=select, subprocess=subprocess)
    space |= dict(sys=sys, time=time, Path=Path, NamedTuple=NamedTuple)
    exec("\n".join(cells), space)
    processes = []

    def start(name, repeats):
        (of_child, go), (done, to_here) = os.pipe(), os.pipe()
        code = TAKES_TURNS.replace("FAULT", fault if name == slow else "pass")
        given = [sys.executable, "-c", code, str(of_child), str(to_here)]
        pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        processes.append(subprocess.Popen(given, **pipes, pass_fds=(of_child, to_here)))
        os.close(of_child)
        os.close(to_here)
        return space["Trainer"](processes[-1], go, done)

    space["start"] = start
    if "sleep" in fault:
        made = space["in_turns"](2.0, 15)
        assert made["ours"]["note"] == made["stock"]["note"] == f"{slow} not finished in 0.5 s"
        assert all(o["seconds"] == [] for o in made.values())
    else:
        with pytest.raises(RuntimeError, match=f"(?s){slow} failed.*no model"):
            space["in_turns"](2.0, 15)
    assert all(o.poll() is not None for o in processes)


def shown(nb):
    "What a reader sees, a list for each cell: texts and tables, and that there is a picture."
    seen = {}
    for i, cell in enumerate(nb.cells):
        for output in cell.get("outputs", []):
            data = dict(output.get("data", {"text/plain": output.get("text", "")}))
            if "image/png" in data:
                data["image/png"] = "a picture"
            seen.setdefault(i, []).append(data)
    return seen


@pytest.mark.parametrize("name", reading.NAMES)
def test_committed_outputs_are_those_of_the_published_run(name, tmp_path):
    committed = shown(nbformat.read(reading.EXPERIMENTS / f"{name}.ipynb", 4))
    assert committed and committed == shown(reading.render(name, "pocket", tmp_path))


def test_pictures_are_small_and_have_their_numbers():
    "One format, with the table that is drawn under the same stem."
    published = [o for o in reading.PUBLISHED.rglob("*") if o.is_file()]
    assert not [o for o in published if o.suffix == ".svg"]
    pictures = [o for o in published if o.suffix == ".png"]
    assert pictures and all(o.with_suffix(".csv").is_file() for o in pictures)
    assert not [o.name for o in pictures if o.stat().st_size > PICTURE_BYTES]


@pytest.mark.parametrize(
    "name, record", [("pretrain_pocket", "pocket/pretrain"), ("overhead", "sweep")]
)
def test_what_stands_alone_shows_the_run_that_was_published(name, record):
    run = nbformat.read(reading.PUBLISHED / record / "executed.ipynb", 4)
    outputs = {
        cell.id: [output_text(o) for o in cell.outputs] for cell in run.cells if "outputs" in cell
    }
    committed = [
        o for o in nbformat.read(reading.EXPERIMENTS / f"{name}.ipynb", 4).cells if o.get("outputs")
    ]
    assert committed
    for cell in committed:
        assert all(output_text(o) in outputs[cell.id] for o in cell.outputs)


def output_text(output):
    text = output.get("text") or output.get("data", {}).get("text/plain")
    return re.sub(r" at 0x\w+", "", text)  # an address, which nbdev_clean takes away
