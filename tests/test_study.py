"""Sweeps: bad input, failures, two at once, and being killed at random moments.

The notebook under test writes a curve that is computed here again, so that what a sweep leaves
behind has an independent oracle. It keeps a checkpoint after every update, as the trainer does.
"""

import csv
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import nbformat
import psutil
import pytest
from typer.testing import CliRunner

from klrb import models
from klrb.sweeps import notebooks
from klrb.cli import app
from klrb.sweeps import sweep as sweep_module
from klrb.sweeps import workers
from klrb.sweeps.notebooks import execute, make_runs, write_template
from klrb.sweeps.parameters import parse_grid, read_grid, read_template
from klrb.files import digest
from klrb.sweeps.runs import read_record
from klrb.sweeps.sweep import SweepFailed, render, retry, status, sweep
from klrb.sweeps.workers import Execution, known_costs, last_update, share_cores

PARAMETERS = """seed: int = 0  # of the curve
beta: float = 0.5  # of the curve
updates: int = 5  # rows of the curve
pause: float = 0.0  # seconds per update
mode: str = "work"  # or a way to fail
out_dir: str = "."  # folder"""

CURVE = """import json, os, random, signal, time
from pathlib import Path
out = Path(out_dir)
if mode == "raise": raise ValueError(f"beta is {beta}\\nand more")
if mode == "hang": time.sleep(100)
if mode == "die": os.kill(os.getpid(), signal.SIGKILL)
if mode == "full": open("/dev/full", "w").write("x" * 10**6)
rng, value, done, rows = random.Random(seed), 0.0, 0, "seed,step,metric,value,unit\\n"
if (out/"checkpoint.json").is_file():
    done, value, state, rows = json.loads((out/"checkpoint.json").read_text())
    rng.setstate((state[0], tuple(state[1]), state[2]))
(out/"metrics.csv").write_text(rows)
for step in range(done + 1, updates + 1):
    time.sleep(pause)
    value = beta * value + rng.gauss(0, 1)
    with (out/"metrics.csv").open("a") as file: file.write(f"{seed},{step},reward,{value!r},1\\n")
    state = [step, value, rng.getstate(), (out/"metrics.csv").read_text()]
    (out/"checkpoint.json.tmp").write_text(json.dumps(state))
    os.replace(out/"checkpoint.json.tmp", out/"checkpoint.json")
if mode != "silent":
    (out/"result.json.tmp").write_text(json.dumps(dict(reward=value, seed=seed, beta=beta)))
    os.replace(out/"result.json.tmp", out/"result.json")
(out/"checkpoint.json").unlink(missing_ok=True)"""


def curve(seed, beta, updates):
    rng, value, rows = random.Random(seed), 0.0, []
    for step in range(1, updates + 1):
        value = beta * value + rng.gauss(0, 1)
        rows.append([str(seed), str(step), "reward", repr(value), "1"])
    return rows


def write_notebook(path, parameters=PARAMETERS, body=CURVE, tags=("parameters",)):
    cells = [
        nbformat.v4.new_code_cell(parameters, metadata=dict(tags=list(tags))),
        nbformat.v4.new_code_cell(body),
    ]
    kernel = dict(name="python3", display_name="python3", language="python")
    nbformat.write(nbformat.v4.new_notebook(cells=cells, metadata=dict(kernelspec=kernel)), path)
    return path


@pytest.fixture
def notebook(tmp_path):
    return write_notebook(tmp_path / "curve.ipynb")


@pytest.fixture
def no_kernel(monkeypatch):
    """Runs in this process, for what does not depend on kernels and workers.

    Returns the list of the runs that were executed.
    """
    executed = []

    def fake(run, descriptor, threads, log, started):
        executed.append(run.name)
        scope = dict(run.parameters, **run.folders, out_dir=str(run.folder))
        exec("".join(json.loads(run.notebook.read_text())["cells"][1]["source"]), scope)

    monkeypatch.setattr(notebooks, "_papermill", fake)
    monkeypatch.setattr(notebooks, "environment", dict)
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)
    monkeypatch.setattr(
        sweep_module,
        "execute_all",
        lambda runs, execution, costs=None: {run.key: execute(run) for run in runs},
    )
    return executed


def start(notebook, out, *options):
    "A sweep from the command line, in a process group of its own"
    command = [
        sys.executable,
        "-c",
        "from klrb.cli import app; app()",
        "sweep",
        str(notebook),
        "--out",
        str(out),
        *map(str, options),
    ]

    def hear_interrupts():  # a shell's background jobs, such as these tests, ignore them
        signal.signal(signal.SIGINT, signal.SIG_DFL)

    return subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
        preexec_fn=hear_interrupts,
    )


def finish(process):
    output = process.communicate(timeout=300)[0]
    assert process.returncode == 0, output
    assert "Traceback" not in output
    return output


def check_finished(out, seeds, betas, updates):
    "Every run once, every curve and result as computed here, nothing else left behind"
    found = {}
    for folder in (out / "curve").iterdir():
        record, result = read_record(folder), json.loads((folder / "result.json").read_text())
        assert record["state"] == "done" and folder.name.endswith(record["identity"][:12])
        cell = record["parameters"]["seed"], record["parameters"]["beta"]
        assert cell not in found
        rows = list(csv.reader((folder / "metrics.csv").open()))
        expected = curve(*cell, updates)
        assert rows == [["seed", "step", "metric", "value", "unit"], *expected]
        assert result == dict(reward=float(expected[-1][3]), seed=cell[0], beta=cell[1])
        nbformat.validate(nbformat.read(folder / "executed.ipynb", as_version=4))
        assert sorted(p.name for p in folder.iterdir()) == [
            "environment.json",
            "executed.ipynb",
            "log.txt",
            "metrics.csv",
            "params.json",
            "result.json",
            "run.json",
        ]
        found[cell] = (folder / "result.json").stat().st_mtime_ns
    assert sorted(found) == sorted((seed, beta) for seed in range(seeds) for beta in betas)
    assert sorted(p.name for p in out.iterdir()) == ["curve", "notebooks", "sweep.json"]
    assert {row["state"] for row in status(out)} == {"done"}
    return found


def gone_is_none(ask):
    "What a process says of itself; None when it has ended, is a zombie, or is somebody else's"
    try:
        return ask()
    except psutil.Error:
        return None


def workers_of(process):
    "Dask's workers below a sweep; any of them may end while this looks"
    children = gone_is_none(lambda: psutil.Process(process.pid).children(recursive=True)) or []
    return [o for o in children if "spawn_main" in " ".join(gone_is_none(o.cmdline) or [])]


def at_work_in(folder):
    "Kernels whose working folder is below this one"
    alive = [o for o in psutil.process_iter() if str(folder) in (gone_is_none(o.cwd) or "")]
    return [o for o in alive if gone_is_none(o.status) not in (None, psutil.STATUS_ZOMBIE)]


def until(condition, seconds=300):
    "Wait for what must happen, however busy the machine is; returns what the condition returned"
    deadline = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < deadline, "has not happened"
        time.sleep(0.05)
    return found


# Killed at random moments


def torment(notebook, out, blows, options):
    """A sweep that receives `blows`, each a call that waits and what to kill then.

    It is started anew whenever it has ended. Returns what was killed, and the time stamps of
    results that were seen finished before the last blow.
    """
    killed, seen = [], {}
    process = start(notebook, out, *options)
    for wait, target in blows:
        wait()
        for folder in out.glob("curve/*"):
            if read_record(folder).get("state") == "done":
                seen.setdefault(folder.name, (folder / "result.json").stat().st_mtime_ns)
        if process.poll() is not None:  # had finished: a finished sweep is killed, too
            process.communicate()
            process = start(notebook, out, *options)
        workers = workers_of(process)
        if target == "worker" and workers:
            gone_is_none(workers[len(killed) % len(workers)].kill)
        else:
            target = "sweep"
            process.kill()
            process.communicate()
            process = start(notebook, out, *options)
        killed.append(target)
    finish(process)
    return killed, seen


def check_torment(notebook, out, blows, seeds, betas, updates, pause):
    grid = dict(beta=",".join(map(str, betas)), updates=updates, pause=pause)
    options = [o for item in grid.items() for o in ("--grid", "=".join(map(str, item)))] + [
        "--seeds",
        seeds,
    ]
    killed, seen = torment(notebook, out, blows, options)
    until(lambda: not at_work_in(out))
    stamps = check_finished(out, seeds, betas, updates)
    for name, stamp in seen.items():
        assert (out / "curve" / name / "result.json").stat().st_mtime_ns == stamp, (
            "a finished run was made again"
        )
    assert len(stamps) == seeds * len(betas)
    return killed


def test_a_sweep_that_is_killed_finishes_as_if_nothing_had_happened(notebook, tmp_path):
    """A worker is killed while the first run is at work.

    The sweep is killed when that run, and any other, has made its way again.
    """
    out = tmp_path / "out"

    def reached(updates):
        def has():
            return sum(last_update(o) or 0 for o in out.glob("curve/*")) >= updates

        return lambda: until(has)

    killed = check_torment(
        notebook,
        out,
        [(reached(1), "worker"), (reached(10), "sweep")],
        seeds=2,
        betas=[0.1, 0.5],
        updates=8,
        pause=0.1,
    )
    assert killed == ["worker", "sweep"]


@pytest.mark.slow
@pytest.mark.parametrize("repetition", range(3))
def test_thirty_kills(notebook, tmp_path, repetition):
    """Twelve runs, killed at thirty random moments.

    With KLRB_CRASH set to a path, the tally goes there: outputs/published/sweep/crash.csv.
    """
    began, rng = time.perf_counter(), random.Random(repetition)
    grid = dict(seeds=4, betas=[0.1, 0.5, 0.9], updates=20, pause=0.15)
    check_torment(notebook, tmp_path / "calm", [], **grid)
    blows = [
        (lambda delay=rng.uniform(0.3, 5): time.sleep(delay), rng.choice(["worker", "sweep"]))
        for _ in range(30)
    ]
    killed = check_torment(notebook, tmp_path / "out", blows, **grid)
    attempts = [
        len(read_record(folder)["attempts"]) for folder in (tmp_path / "out" / "curve").iterdir()
    ]
    for folder in (tmp_path / "calm" / "curve").iterdir():
        for name in ("metrics.csv", "result.json"):
            assert digest(folder / name) == digest(tmp_path / "out" / "curve" / folder.name / name)
    if "KLRB_CRASH" in os.environ:
        row = dict(
            repetition=repetition,
            runs=len(attempts),
            sweeps_killed=killed.count("sweep"),
            workers_killed=killed.count("worker"),
            identical_runs=len(attempts),
            failed_attempts=sum(attempts) - len(attempts),
            seconds=round(time.perf_counter() - began),
        )
        add_row(Path(os.environ["KLRB_CRASH"]), row)


def add_row(path, row):
    "Put a repetition into the table, in the place of an earlier one"
    rows = list(csv.DictReader(path.open())) if path.is_file() else []
    rows = [o for o in rows if o["repetition"] != str(row["repetition"])] + [row]
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, row)
        writer.writeheader()
        writer.writerows(sorted(rows, key=lambda row: int(row["repetition"])))


@pytest.mark.slow
def test_the_trainer_goes_on_from_its_checkpoint(tmp_path):
    """Two arms of the real experiment, workers killed while they train.

    Curves and evaluations are as without.
    """
    rloo = Path(__file__).parents[1] / "nbs" / "experiments" / "rloo.ipynb"
    options = [
        "--profile",
        "smoke",
        "--grid",
        "kl_estimator=mc,rb",
        "--grid",
        "updates=60",
        "--grid",
        "save_every=2",
        "--seeds",
        1,
        "--cache",
        tmp_path / "cache",
    ]
    finish(start(rloo, tmp_path / "calm", *options))
    kinds = {p.suffix for p in (tmp_path / "cache" / "prepare").rglob("*") if p.is_file()}
    assert kinds <= {
        ".safetensors",
        ".json",
        ".csv",
        ".parquet",
        ".ipynb",
        ".txt",
    }  # nothing that is unpickled
    process, kills, killed_at = start(rloo, tmp_path / "out", *options), 4, {}
    while kills and process.poll() is None:
        time.sleep(1)
        for folder in (tmp_path / "out" / "rloo").glob("*"):
            update = last_update(folder) or 0
            if update >= killed_at.get(folder, 0) + 10 and list(
                folder.glob("trainer/checkpoint-*")
            ):
                above = [o for k in at_work_in(folder) for o in gone_is_none(k.parents) or []]
                workers = [o for o in workers_of(process) if o in above]
                if not workers:
                    continue  # the run has just ended
                gone_is_none(workers[0].kill)
                killed_at[folder], kills = update, kills - 1
                break
    finish(process)
    assert kills == 0
    for calm in (tmp_path / "calm" / "rloo").iterdir():
        folder = tmp_path / "out" / "rloo" / calm.name
        curves = [
            [
                row
                for row in csv.DictReader((o / "metrics.csv").open())
                if row["metric"] != "seconds"
            ]
            for o in (calm, folder)
        ]
        assert curves[0] == curves[1] and len({row["step"] for row in curves[0]}) == 60
        results = [
            {
                k: v
                for k, v in json.loads((o / "result.json").read_text()).items()
                if "seconds" not in k
            }
            for o in (calm, folder)
        ]
        assert results[0] == results[1] and digest(calm / "evaluation.csv") == digest(
            folder / "evaluation.csv"
        )
        assert sorted(p.name for p in calm.iterdir()) == sorted(p.name for p in folder.iterdir())


# Ctrl-C, two at once, failures: with real kernels and workers


def test_ctrl_c_interrupts_the_kernels_and_keeps_their_metrics(notebook, tmp_path):
    out = tmp_path / "out"
    process = start(
        notebook, out, "--grid", "updates=1000", "--grid", "pause=0.1", "--seeds", 3, "--workers", 1
    )
    until(lambda: any(last_update(path.parent) for path in out.glob("curve/*/metrics.csv")))
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does
    output = process.communicate(timeout=120)[0]
    assert process.returncode == 130 and "Traceback" not in output, output
    assert output.strip().endswith(
        "klrb: stopped; 1 interrupted, 2 pending. The same command goes on from here."
    )
    (row,) = [row for row in status(out) if row["state"] == "interrupted"]
    rows = list(csv.reader((out / row["key"] / "metrics.csv").open()))[1:]
    assert len(rows) == row["update"] > 0 and rows == curve(0, 0.5, len(rows))
    until(lambda: not at_work_in(out))
    assert not list(out.glob("**/.lock"))


def test_two_sweeps_share_the_runs_of_one_folder(notebook, tmp_path):
    options = ["--grid", "beta=0.1", "--grid", "pause=0.1", "--seeds", 3, "--workers", 1]
    for process in [start(notebook, tmp_path / "out", *options) for _ in range(2)]:
        finish(process)
    check_finished(tmp_path / "out", 3, [0.1], 5)
    assert [len(read_record(o)["attempts"]) for o in (tmp_path / "out" / "curve").iterdir()] == [
        1
    ] * 3


def test_a_failing_run_stops_no_other_and_says_why(notebook, tmp_path):
    """On a scheduler of its own, as on a cluster, whose worker runs two notebooks at a time."""
    from distributed import LocalCluster
    from jupyter_core.utils import ensure_event_loop

    ensure_event_loop()  # as after a notebook that this process has executed
    out = tmp_path / "out"
    grid = dict(mode=["work", "raise", "die", "full", "silent"])
    with LocalCluster(
        n_workers=1, threads_per_worker=2, processes=False, dashboard_address="127.0.0.1:0"
    ) as cluster:
        with pytest.raises(SweepFailed, match="4 of 5 runs failed"):
            sweep(
                notebook,
                grid=grid,
                out=out,
                execution=Execution(scheduler=cluster.scheduler_address, retries=0),
            )
    rows = {row["parameters"]["mode"]: row for row in status(out)}
    assert {mode: row["reason"] for mode, row in rows.items()} == {
        "work": "",
        "raise": "ValueError: beta is 0.5 (cell 3)",
        "die": "the kernel was killed (SIGKILL)",
        "full": "OSError: [Errno 28] No space left on device (cell 3)",
        "silent": "StateError: the notebook ended without writing result.json",
    }
    assert {mode for mode, row in rows.items() if row["state"] == "done"} == {"work"}


def test_a_run_that_takes_too_long_is_killed(notebook, tmp_path):
    template = read_template(notebook)
    (run,) = make_runs(template, [dict(mode="hang")], tmp_path)
    write_template(template, [run])
    outcome = execute(run, timeout=0.1)  # while the kernel starts
    assert (outcome["state"], outcome["reason"]) == ("failed", "timeout: ran for more than 0.1 s")
    until(lambda: not at_work_in(tmp_path))


def test_the_memory_of_kernels_is_counted(tmp_path):
    "As a study reports it; the kernels are forked from a process that no worker has waited for."
    cells = [
        nbformat.v4.new_code_cell("out_dir: str = '.'", metadata=dict(tags=["parameters"])),
        nbformat.v4.new_code_cell("x = bytearray(b'1') * (700 * 2**20)"),
        nbformat.v4.new_code_cell("open(out_dir + '/result.json', 'w').write('{}')"),
    ]
    nbformat.write(nbformat.v4.new_notebook(cells=cells), tmp_path / "large.ipynb")
    script = """if __name__ == "__main__":
        import resource
        from klrb.sweeps.sweep import sweep
        sweep("large.ipynb", out="out")
        print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)"""
    (tmp_path / "script.py").write_text(script)
    done = subprocess.run(
        [sys.executable, "script.py"], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    assert int(done.stdout.split()[-1]) > 700 * 2**10  # kB


# What needs no kernel


def test_retries_and_retry(notebook, tmp_path, monkeypatch, no_kernel):
    out, answers = tmp_path / "out", CliRunner()
    command = ["sweep", str(notebook), "--grid", "mode=work,raise", "--out", str(out)]
    answer = answers.invoke(app, command)
    assert (
        answer.exit_code == 1
        and "1 of 2 runs failed" in answer.output
        and "ValueError: beta is 0.5" in answer.output
    )
    assert "1 failed, 1 done" in answers.invoke(app, ["sweep", "status", str(out)]).output.replace(
        "1 done, 1 failed", "1 failed, 1 done"
    )
    no_kernel.clear()
    with pytest.raises(SweepFailed):
        retry(out)
    assert no_kernel == ["raise"]
    no_kernel.clear()
    assert (
        answers.invoke(app, [*command[:3], "mode=work", *command[4:]]).exit_code == 0
        and no_kernel == []
    )
    assert answers.invoke(app, ["sweep", "retry", str(tmp_path)]).exit_code == 2


def test_what_changes_a_run_and_what_does_not(notebook, tmp_path, monkeypatch, no_kernel):
    asked = dict(notebook=notebook, grid=dict(beta=[0.1]), seeds=2, out=tmp_path / "out")

    def count(**more):
        no_kernel.clear()
        sweep(**(asked | more))
        return len(no_kernel)

    assert count() == 2 and count() == 0
    assert count(grid=dict(beta=["0.10", 0.5])) == 2  # the grid has grown
    os.rename(tmp_path / "out", tmp_path / "moved")
    assert count(out=tmp_path / "moved") == 0
    assert (
        count(out=tmp_path / "moved", grid=dict(beta=[0.1], pause=[0.0])) == 0
    )  # the default, said
    write_notebook(notebook, body=CURVE + "\n# another")
    assert count(out=tmp_path / "moved") == 2
    assert (
        len(list((tmp_path / "moved" / "curve").iterdir())) == 6
        and len(status(tmp_path / "moved")) == 4
    )  # the old ones stay, unlisted
    monkeypatch.setattr(notebooks, "code_digest", lambda source: "edited")
    assert count(out=tmp_path / "moved") == 2


def test_a_worker_with_other_code_refuses(notebook, tmp_path, monkeypatch):
    template = read_template(notebook)
    (run,) = make_runs(template, [{}], tmp_path)
    write_template(template, [run])
    monkeypatch.setattr(notebooks, "code_digest", lambda source: "other")
    outcome = execute(run)
    assert outcome["state"] == "failed" and "another version" in outcome["reason"]


def test_editing_the_notebook_during_a_sweep_changes_nothing(notebook, tmp_path, no_kernel):
    template = read_template(notebook)
    (run,) = make_runs(template, [{}], tmp_path)
    write_template(template, [run])
    write_notebook(notebook, body="raise SystemExit")
    assert execute(run)["state"] == "done"


PREPARE = """from pathlib import Path
(Path(out_dir)/"model").mkdir(exist_ok=True)
(Path(out_dir)/"model"/"weights.safetensors").write_bytes(bytes(range(256)))
open(out_dir + "/result.json", "w").write("{}")"""
USE = """import pathlib
size = len(pathlib.Path(prepare_dir, "model", "weights.safetensors").read_bytes())
open(out_dir + "/result.json", "w").write('{"size": %d}' % size)"""


@pytest.fixture
def prepared_notebook(tmp_path):
    profile = 'profile: str = "smoke"  # preset\nout_dir: str = "."  # folder'
    write_notebook(tmp_path / "prepare.ipynb", profile, PREPARE)
    return write_notebook(tmp_path / "use.ipynb", 'prepare_dir: str = "."  # read\n' + profile, USE)


@pytest.mark.parametrize("harm", ["truncate", "flip", "remove"])
def test_a_damaged_preparation_is_reported_and_made_again(
    prepared_notebook, tmp_path, capsys, no_kernel, harm
):

    def again():
        no_kernel.clear()
        sweep(prepared_notebook, out=tmp_path / "out", cache=tmp_path / "cache")
        return no_kernel

    assert len(again()) == 2 and again() == []
    (weights,) = tmp_path.glob("cache/prepare/*/model/weights.safetensors")
    if harm == "truncate":
        weights.write_bytes(weights.read_bytes()[:-1])
    if harm == "flip":
        weights.write_bytes(b"\1" + weights.read_bytes()[1:])
    if harm == "remove":
        weights.unlink()
    answer = CliRunner().invoke(app, ["report", str(tmp_path / "out")])
    assert answer.exit_code == 2 and "damaged (model/weights.safetensors)" in answer.output
    capsys.readouterr()
    assert again() == [
        "smoke"
    ]  # the run that read it stays valid: the content is again what it was
    assert (
        "the prepared files of 'smoke' are damaged (model/weights.safetensors): made again"
        in capsys.readouterr().out
    )
    assert again() == []


def test_another_preparation_is_another_run(prepared_notebook, tmp_path, no_kernel):
    sweep(prepared_notebook, out=tmp_path / "out")
    write_notebook(
        tmp_path / "prepare.ipynb",
        'profile: str = "smoke"  # preset\nout_dir: str = "."  # folder',
        PREPARE.replace("256", "255"),
    )
    no_kernel.clear()
    sweep(prepared_notebook, out=tmp_path / "out")
    assert no_kernel == ["smoke", "run"] or no_kernel == ["smoke", "smoke"]


def test_a_report_of_half_a_sweep(notebook, tmp_path, capsys, no_kernel):
    with pytest.raises(SweepFailed):
        sweep(notebook, grid=dict(mode=["work", "raise"]), seeds=2, out=tmp_path / "out")
    rows = list(csv.DictReader((render(tmp_path / "out") / "sweep.csv").open()))
    assert "2 of 4 runs are finished: the report is partial" in capsys.readouterr().out
    assert [(o["mode"], o["state"], o["reward"] != "") for o in rows] == [
        ("work", "done", True),
        ("raise", "failed", False),
    ] * 2


def test_longest_first_needs_finished_runs(notebook, tmp_path, no_kernel):
    sweep(notebook, grid=dict(beta=[0.1, 0.5]), seeds=1, out=tmp_path)
    template = read_template(notebook)
    runs = make_runs(template, read_grid(template, dict(beta=[0.1, 0.5, 0.9]), 2), tmp_path)
    assert runs[0].finished and not runs[3].finished
    for run in runs[:2]:
        record = read_record(run.folder)
        record["attempts"] = [dict(seconds=100 * run.parameters["beta"])]
        (run.folder / "run.json").write_text(json.dumps(record))
    costs = known_costs(runs)
    assert [costs[run.key] for run in runs] == [
        10.0,
        50.0,
        30.0,
    ] * 2  # its own setting's, else the mean
    assert known_costs(make_runs(template, [{}], tmp_path / "empty")) == {}


def test_a_finished_sweep_of_100_runs_is_seen_to_be_finished(notebook, tmp_path, no_kernel):
    sweep(notebook, grid=dict(beta=[b / 10 for b in range(10)]), seeds=10, out=tmp_path / "out")
    assert len(no_kernel) == 100
    began = resource.getrusage(resource.RUSAGE_CHILDREN)
    output = finish(
        start(
            notebook,
            tmp_path / "out",
            "--grid",
            f"beta={','.join(str(b / 10) for b in range(10))}",
            "--seeds",
            10,
        )
    )
    assert output == "100 of 100 runs are finished already\n"
    ended = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert (
        ended.ru_utime + ended.ru_stime - began.ru_utime - began.ru_stime < 9
    )  # seconds of a processor; the target is 3


def test_cores_are_never_oversubscribed():
    for cores in (1, 2, 3, 8, 64):
        for runs in (1, 5, 100):
            for threads in (None, 1, 2):
                if (threads or 1) > cores:
                    continue
                workers, each = share_cores(Execution(threads=threads), runs, cores)
                assert 1 <= workers <= runs and workers * each <= cores


# Parameters: what arrives is what was asked, what is not asked stays as it is

CELL = """%matplotlib inline
import math
from typing import Literal, Optional
seed: int = 0  # seed = 0, the first (of 5)
beta: float = -0.5  # weight; beta=0 is "none" # of two
betas: tuple[float, float] = (0.9, 0.99)  # of the optimiser
text: str = \'\'\'a line = one  # no comment
another "line", the 'third'
\'\'\'
joined = ("one "
          "two # three")
rates = [1e-4,  # first
         2e-4]
empty = None
limit: Optional[int] = None
either: "int | None" = 3
table: dict[str, list[int]] = {"a=b": [1, 2], "#": []}
kind: Literal["rb", "mc"] = "rb"
third = 1/3  # no literal
place = f"{third:.2f}"
pair, other = 1, 2
same = again = True
unset: float
out_dir: str = "."  # folder"""
ECHO = """import json
names = [o for o in list(globals()) if o in NAMES]
json.dump({o: repr(globals()[o]) for o in names}, open(out_dir + "/result.json", "w"))"""


def executed_cell(source):
    "What Python makes of the cell: the oracle"
    space = {}
    exec(source.replace("%matplotlib inline", ""), space)
    return space


def test_parameters_are_what_python_makes_of_the_cell(tmp_path):
    found, space = (
        read_template(write_notebook(tmp_path / "odd.ipynb", CELL)).known,
        executed_cell(CELL),
    )
    assert set(found) == set(space) - {
        "__builtins__",
        "__annotations__",
        "math",
        "Literal",
        "Optional",
    } | {"unset"}
    literals = {name: o.default for name, o in found.items() if o.literal}
    assert literals == {name: space[name] for name in literals}
    assert set(found) - set(literals) == {"third", "place", "pair", "other", "unset"}


HARD = [
    "it's",
    'say "no"',
    "back\\slash \\n",
    "two\nlines",
    "\r\t\0\x1b",
    "ünïcødé 漢字 🙂",
    "\u2028\u2029\x85",
    "\udc80",
    "{beta} %s $HOME",
    "# no = comment",
    "'''",
    '"""',
    "",
    " ",
    "True",
    "None",
    "nan",
    "0.1",
    "-",
    "\\",
]


def test_what_arrives_in_the_kernel_is_what_was_asked(tmp_path):
    """In a folder whose name papermill would format, and other programs would split."""
    names = [
        "text",
        "betas",
        "joined",
        "rates",
        "empty",
        "limit",
        "table",
        "third",
        "place",
        "unset",
        "beta",
        "texts",
    ]
    cell = CELL + "\ntexts: list[str] = []"
    template = read_template(
        write_notebook(tmp_path / "odd.ipynb", cell, ECHO.replace("NAMES", repr(names)))
    )
    asked = dict(
        text=HARD[0], texts=HARD, limit=-3, table={"k": [1], "#=": []}, unset=1e-300, beta=-0.0
    )
    (cells,) = read_grid(template, {name: [value] for name, value in asked.items()})
    out = tmp_path / "a {beta} = 'b'"
    (run,) = make_runs(template, [cells], out)
    write_template(template, [run])
    outcome = execute(run)
    assert outcome["state"] == "done", outcome
    expected = executed_cell(cell) | asked
    assert json.loads((run.folder / "result.json").read_text()) == {
        name: repr(expected[name]) for name in names
    }
    record = json.loads((run.folder / "params.json").read_text())
    literal = [name for name in names if name not in ("third", "place")]
    assert {name: record[name] for name in literal} == {
        name: json.loads(json.dumps(expected[name])) for name in literal
    }
    assert (record["third"], record["place"], record["pair"]) == (
        "1 / 3",
        "f'{third:.2f}'",
        "pair, other = (1, 2)",
    )


def test_a_sweep_sets_only_what_it_sweeps(notebook, tmp_path):
    template = read_template(notebook)
    (run,) = make_runs(template, read_grid(template, dict(beta=[0.1])), tmp_path)
    assert run.given == dict(beta=0.1) and run.parameters == dict(
        seed=0, beta=0.1, updates=5, pause=0.0, mode="work"
    )


GIVEN = {  # of CELL, on the command line
    "a tuple": ("betas", "(0.8,0.9)", [(0.8, 0.9)]),
    "ints for floats": ("betas", "[1, 2],(0.5,0.6)", [(1.0, 2.0), (0.5, 0.6)]),
    "a list by its default": ("rates", "[0.1, 0.2],[]", [[0.1, 0.2], []]),
    "None": ("limit", "None,5", [None, 5]),
    "a forward reference": ("either", "4,None", [4, None]),
    "a choice": ("kind", "mc,rb", ["mc", "rb"]),
    "a bool": ("same", "false,True", [False, True]),
    "a dict": ("table", "{'a': [1]},{}", [{"a": [1]}, {}]),
    "a comma in a bracket's text": ("table", '{"a,b]": []}', [{"a,b]": []}]),
    "text that looks like a literal": ("joined", "(a,[b]", ["(a", "[b]"]),
    "text None": ("joined", "None,1", ["None", "1"]),
    "anything": ("empty", "1,x,None,(1,2)", [1, "x", None, (1, 2)]),
    "no default": ("unset", "1", [1.0]),
    "negative": ("beta", "-1e-3", [-0.001]),
    "an int for a float": ("beta", "1,02", [1.0, 2.0]),
    "a number as text": ("joined", "1.50,'a'", ["1.50", "'a'"]),
}


@pytest.mark.parametrize("case", GIVEN)
def test_values_of_the_command_line(tmp_path, case):
    name, text, expected = GIVEN[case]
    template = read_template(write_notebook(tmp_path / "odd.ipynb", CELL))
    cells = read_grid(template, parse_grid([f"{name}={text}"]))
    assert [repr(cell[name]) for cell in cells] == [repr(value) for value in expected]


REFUSED = {
    "a number for a tuple": (
        "betas",
        "0.9",
        "`betas` is '0.9', but `odd.ipynb` wants tuple[float, float]",
    ),
    "a bracket that never closes": ("betas", "(0.9,0.99", "wants tuple[float, float]"),
    "too many": ("betas", "(1,2,3)", "wants tuple"),
    "text in a tuple": ("betas", "('a',2)", "wants tuple"),
    "infinity in a tuple": ("betas", "(1e999,2)", "wants tuple"),
    "a bool in a tuple": ("betas", "(True,2)", "wants tuple"),
    "texts for numbers": ("betas", "('1','2')", "wants tuple"),
    "yes for true": ("same", "yes", "wants bool"),
    "one for true": ("same", "1", "wants bool"),
    "true for one": ("limit", "True", "wants Optional[int]"),
    "a whole float": ("limit", "1.0", "wants Optional[int]"),
    "a call": ("betas", "(exit(),2)", "wants tuple"),
    "no choice": ("kind", "k3", "wants Literal['rb', 'mc']"),
    "not None": ("beta", "None", "wants float"),
    "a float for an int": ("limit", "1.5", "wants Optional[int]"),
    "no literal": ("third", "0.3", "`third` in `odd.ipynb` has a default that is no literal"),
    "an f-string": ("place", "x", "no literal"),
    "half of a pair": ("pair", "3", "no literal"),
    "tuple twice": ("betas", "(1,2),[1.0,2.0]", "a value twice"),
    "numbers as keys": ("table", "{1: [2]}", "wants dict"),
    "code": ("table", "__import__('os')", "wants dict"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_values_that_are_refused(tmp_path, case):
    name, text, message = REFUSED[case]
    write_notebook(tmp_path / "odd.ipynb", CELL)
    output = refused(
        "sweep",
        tmp_path / "odd.ipynb",
        "--out",
        tmp_path / "out",
        "--grid",
        f"{name}={text}",
        "--grid",
        "unset=1",
    )
    assert message in output and output.count("\n") == 1 and not (tmp_path / "out").exists()


CELLS = {
    "computed before it is set": (
        "beta: float = 0.1\nhalf = beta/2",
        "computes with `beta` (`half = beta / 2`)",
    ),
    "in an if": ("beta: float = 0.1\nif beta > 1:\n    big = 1", "computes with `beta`"),
    "a folder": ("beta: float = 0.1\nfile = f'{out_dir}/x'", "computes with `out_dir`"),
    "twice": ("beta: float = 0.1\nbeta = 0.2", "sets `beta` twice"),
    "added to": ("beta = 0.1\nbeta += 0.2", "sets `beta` twice"),
    "no Python": ("beta: float = ", "is no Python"),
    "no default": ("beta: float = 0.1\nrate: float", "`rate` has no default"),
    "no known type": ("beta: complex = 1j", "annotated `complex`"),
}


@pytest.mark.parametrize("case", CELLS)
def test_cells_that_are_refused(tmp_path, case):
    cell, message = CELLS[case]
    write_notebook(tmp_path / "odd.ipynb", 'out_dir: str = "."\n' + cell)
    output = refused(
        "sweep",
        tmp_path / "odd.ipynb",
        "--out",
        tmp_path / "out",
        "--grid",
        "beta=0.5",
        "--dry-run",
    )
    assert message in output and output.count("\n") == 1


def test_a_sweep_of_tuples_goes_on_and_is_tried_again(tmp_path, no_kernel):
    body = """import json
assert betas[0] < 0.95
json.dump(dict(reward=betas[0]), open(out_dir + '/result.json', 'w'))"""
    path = write_notebook(
        tmp_path / "odd.ipynb", 'betas: tuple[float, ...] = (0.9, 0.99)\nout_dir: str = "."', body
    )

    def fails(function, *arguments, **options):
        no_kernel.clear()
        with pytest.raises(SweepFailed):
            function(*arguments, **options)
        return len(no_kernel)

    grid = dict(betas=[(0.8, 0.9), [0.99, 1]])
    assert fails(sweep, path, grid=grid, out=tmp_path / "out") == 2
    assert fails(retry, tmp_path / "out") == 1
    grid = dict(betas=["(0.8,0.9)", (0.99, 1.0)])
    assert fails(sweep, path, grid=grid, out=tmp_path / "out") == 1
    rows = list(csv.DictReader((render(tmp_path / "out") / "sweep.csv").open()))
    assert [(o["betas"], o["state"]) for o in rows] == [
        ("[0.8, 0.9]", "done"),
        ("[0.99, 1.0]", "failed"),
    ]


# Files that are damaged: never a traceback, never "done"

DAMAGE = {
    "empty": b"",
    "truncated": b'{"reward"',
    "a list": b"[1, 2]",
    "a number": b"1",
    "null": b"null",
    "binary": bytes(range(256)),
    "UTF-16 cut": b"\xff\xfe{",
    "too deep": b"[" * 100_000,
    "another object": b"{}",
}


@pytest.mark.parametrize("name", ["result.json", "run.json", "params.json", "environment.json"])
@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_file_of_a_run(notebook, tmp_path, no_kernel, name, damage):
    out = tmp_path / "out"
    sweep(notebook, grid=dict(beta=[0.1, 0.2]), out=out)
    first, second = sorted(folder for folder in (out / "curve").iterdir())
    (first / name).write_bytes(DAMAGE[damage])
    no_kernel.clear()
    decides = name in ("result.json", "run.json")
    state = {"result.json": "failed", "run.json": "pending"}.get(name, "done")
    assert sorted(row["state"] for row in status(out)) == sorted([state, "done"])
    for command in (["sweep", "status"], ["report"]):
        assert CliRunner().invoke(app, [*command, str(out)]).exit_code == 0
    assert len((out / "report" / "sweep.csv").read_text().splitlines()) == 3
    sweep(notebook, grid=dict(beta=[0.1, 0.2]), out=out)
    assert len(no_kernel) == decides and {row["state"] for row in status(out)} == {"done"}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_plan(notebook, tmp_path, no_kernel, damage):
    out = tmp_path / "out"
    sweep(notebook, grid=dict(beta=[0.1]), out=out)
    (out / "sweep.json").write_bytes(DAMAGE[damage])
    for command in (
        ["sweep", notebook, "--grid", "beta=0.1", "--out"],
        ["sweep", "status"],
        ["sweep", "retry"],
        ["report"],
    ):
        output = refused(*command, out)
        assert "is damaged; delete it" in output and output.count("\n") == 1
    (out / "sweep.json").unlink()
    no_kernel.clear()
    sweep(notebook, grid=dict(beta=[0.1]), out=out)
    assert no_kernel == []  # finished runs were kept


@pytest.mark.parametrize("result", ["", '{"reward"', "[1]", "NaN"])
def test_a_notebook_whose_result_is_no_object_has_failed(tmp_path, result):
    path = write_notebook(
        tmp_path / "odd.ipynb",
        'out_dir: str = "."',
        f"open(out_dir + '/result.json', 'w').write({result!r})",
    )
    template = read_template(path)
    (run,) = make_runs(template, [{}], tmp_path / "out")
    write_template(template, [run])
    with pytest.MonkeyPatch.context() as patch:  # without a kernel: the check is what follows it
        patch.setattr(
            notebooks,
            "execute_with",
            lambda notebook, executed, values, **_: (run.folder / "result.json").write_text(result),
        )
        outcome = execute(run)
    assert (outcome["state"], outcome["reason"]) == (
        "failed",
        "StateError: the notebook wrote a result.json that is no JSON object",
    )
    assert not run.finished


# Bad input: one line, exit code 2, nothing left behind


def refused(*arguments):
    answer = CliRunner().invoke(app, [str(o) for o in arguments])
    assert answer.exit_code == 2, answer.output
    assert isinstance(answer.exception, SystemExit)
    return answer.output


GOOD = ["--grid", "beta=0.1"]
BAD_OPTIONS = {
    "unknown parameter": (["--grid", "bta=0.1"], "no parameter 'bta'; it has seed, beta"),
    "no equals sign": (["--grid", "beta"], "give NAME=VALUE"),
    "no name": (["--grid", "=0.1"], "give NAME=VALUE"),
    "no value": (["--grid", "beta="], "give NAME=VALUE"),
    "empty value": (["--grid", "beta=0.1,,0.2"], "give NAME=VALUE"),
    "not a float": (["--grid", "beta=high"], "`beta` is 'high', but `curve.ipynb` wants float"),
    "not a number": (["--grid", "beta=nan"], "wants float"),
    "infinite": (["--grid", "beta=inf"], "wants float"),
    "not an int": (["--grid", "updates=1.5"], "`updates` is '1.5', but `curve.ipynb` wants int"),
    "name twice": (["--grid", "beta=0.1", "--grid", "beta=0.2"], "beta=0.1,0.2"),
    "value twice": (["--grid", "beta=0.1,0.10"], "a value twice"),
    "no seeds": (["--seeds", "0"], "`seeds` is 0"),
    "negative seeds": (["--seeds", "-2"], "`seeds` is -2"),
    "seeds and seed": (["--seeds", "2", "--grid", "seed=1,2"], "use one of them"),
    "folder in the grid": (["--grid", "out_dir=a,b"], "set by the runner"),
    "profile without a parameter": (["--profile", "pocket"], "no parameter 'profile'"),
    "paper without a parameter": (["--profile", "paper"], "no parameter 'profile'"),
    "unknown profile": (["--profile", "poket"], "known profiles are smoke"),
    "no workers": (["--workers", "0"], "`workers` is 0"),
    "no threads": (["--threads", "0"], "`threads` is 0"),
    "negative retries": (["--retries", "-1"], "`retries` is -1"),
    "no time": (["--timeout", "0"], "`timeout` is 0"),
    "more workers than cores": (["--workers", "4000"], "more than the"),
    "scheduler and workers": (["--scheduler", "tcp://127.0.0.1:1", "--workers", "1"], "both given"),
    "dead scheduler": (["--scheduler", "tcp://127.0.0.1:1"], "nothing answers there"),
    "no scheduler address": (["--scheduler", "carrier-pigeon://coop"], "nothing answers there"),
}


@pytest.mark.parametrize("case", BAD_OPTIONS)
def test_bad_options(notebook, tmp_path, case, monkeypatch):
    options, message = BAD_OPTIONS[case]
    monkeypatch.setattr(workers, "_CONNECT", 0.5)
    before = sorted(tmp_path.rglob("*"))
    output = refused("sweep", notebook, "--out", tmp_path / "deep" / "out", *options)
    assert output.startswith("klrb: ") and message in output and output.count("\n") == 1
    assert sorted(tmp_path.rglob("*")) == before


BAD_NOTEBOOKS = {
    "missing": (lambda path: None, "no notebook"),
    "a folder": (lambda path: path.mkdir(), "no notebook"),
    "not JSON": (lambda path: path.write_text("print(1)"), "is not a notebook"),
    "not a notebook": (lambda path: path.write_text("[1]"), "is not a notebook"),
    "binary": (lambda path: path.write_bytes(b"\xff\xfe\0"), "is not a notebook"),
    "no tag": (lambda path: write_notebook(path, tags=()), "0 cells tagged `parameters`"),
    "no literal": (
        lambda path: write_notebook(path, "out_dir: str = '.'  # folder\nbeta: float = pi  # any"),
        "no literal",
    ),
    "another language": (
        lambda path: path.write_text(write_notebook(path).read_text().replace('"python"', '"R"')),
        "is written in R",
    ),
    "no out_dir": (
        lambda path: write_notebook(path, "beta: float = 0.1  # any"),
        "no parameter `out_dir`",
    ),
    "no seed": (
        lambda path: write_notebook(path, "beta: float = 0.1  # any\nout_dir: str = '.'  # folder"),
        "no parameter 'seed'",
    ),
    "nothing to prepare with": (
        lambda path: write_notebook(
            path, PARAMETERS + '\nprofile: str = "smoke"  # any\nprepare_dir: str = "."  # any'
        ),
        "prepare.ipynb",
    ),
    "unknown default profile": (
        lambda path: write_notebook(path, PARAMETERS + '\nprofile: str = "none"  # any'),
        "known profiles",
    ),
}


@pytest.mark.parametrize("case", BAD_NOTEBOOKS)
def test_bad_notebooks(tmp_path, case):
    make, message = BAD_NOTEBOOKS[case]
    make(tmp_path / "curve.ipynb")
    before = sorted(tmp_path.rglob("*"))
    output = refused(
        "sweep", tmp_path / "curve.ipynb", "--out", tmp_path / "out", "--seeds", 2, *GOOD
    )
    assert output.startswith("klrb: ") and message in output and output.count("\n") == 1
    assert sorted(tmp_path.rglob("*")) == before


def no_space(dir):
    raise OSError(28, "No space left on device", str(dir))


BAD_FOLDERS = {
    "a file": (lambda path, patch: path.write_text(""), "", "File exists"),
    "below a file": (lambda path, patch: path.write_text(""), "below", "Not a directory"),
    "read-only": (lambda path, patch: path.symlink_to("/proc/self"), "out", "cannot be written"),
    "full": (
        lambda path, patch: patch.setattr(sweep_module.tempfile, "TemporaryFile", no_space),
        "deep/out",
        "No space left",
    ),
    "an address": (lambda path, patch: None, "s3://bucket/runs", "locks need a file system"),
    "a damaged plan": (
        lambda path, patch: (path.mkdir(), (path / "sweep.json").write_text('{"runs"')),
        "",
        "is damaged; delete it",
    ),
}


@pytest.mark.parametrize("case", BAD_FOLDERS)
def test_bad_folders(notebook, tmp_path, monkeypatch, case):
    make, below, message = BAD_FOLDERS[case]
    make(tmp_path / "out", monkeypatch)
    before = sorted(tmp_path.rglob("*"))
    output = refused(
        "sweep", notebook, "--out", below if "://" in below else tmp_path / "out" / below, *GOOD
    )
    assert output.startswith("klrb: ") and message in output and output.count("\n") == 1
    assert [
        o for o in sorted(tmp_path.rglob("*")) if "notebooks" not in o.parts
    ] == before  # a copy of the notebook may stay


@pytest.mark.parametrize("command", [("sweep", "status"), ("sweep", "retry"), ("report",)])
@pytest.mark.parametrize(
    "make, message",
    [
        (lambda path: None, "holds no sweep"),
        (lambda path: path.write_text(""), "holds no sweep"),
        (lambda path: (path.mkdir(), (path / "sweep.json").write_text("[]")), "is damaged"),
    ],
)
def test_bad_folders_to_look_at(tmp_path, command, make, message):
    make(tmp_path / "out")
    before = sorted(tmp_path.rglob("*"))
    output = refused(*command, tmp_path / "out")
    assert output.startswith("klrb: ") and message in output and output.count("\n") == 1
    assert sorted(tmp_path.rglob("*")) == before


def test_a_damaged_shipped_model_is_refused(tmp_path, monkeypatch):
    root = Path(__file__).parents[1]
    assets = tmp_path / "pocket"
    shutil.copytree(models.POCKET, assets)
    (assets / "model.safetensors").write_bytes((assets / "model.safetensors").read_bytes()[:-1])
    monkeypatch.setattr(models, "POCKET", assets)
    output = refused(
        "sweep", root / "nbs" / "experiments" / "rloo.ipynb", "--out", tmp_path / "out"
    )
    assert (
        "the pocket model has sha256" in output
        and "reinstall klrb" in output
        and output.count("\n") == 1
        and not (tmp_path / "out").exists()
    )


def test_a_report_without_finished_runs(notebook, tmp_path, no_kernel):
    with pytest.raises(SweepFailed):
        sweep(notebook, grid=dict(mode=["raise"]), out=tmp_path / "out")
    assert (
        "has no finished run" in refused("report", tmp_path / "out")
        and not (tmp_path / "out" / "report").exists()
    )
