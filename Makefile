# A bare machine needs git, make and Python 3.11 with venv (Debian: apt-get install git make python3-venv).
# Everything is installed into .venv; outside the clone only DVC keeps an index, in /var/tmp/dvc.

PYTHON ?= python3
SETUP := .venv/.setup-done
export PATH := $(CURDIR)/.venv/bin:$(PATH)

.PHONY: demo demo-t2i demo-janus test lint evidence setup data bundle

demo: setup data     ## the whole pipeline on the embedded data, then the results
	dvc repro
	vapi summary

demo-t2i: setup data ## the same from captions to scenes; params.yaml is the recipe digits-t2i afterwards
	vapi recipe digits-t2i --write
	dvc repro
	vapi summary

demo-janus: setup data ## the same with a tiny Janus; params.yaml is the recipe digits-janus afterwards
	vapi recipe digits-janus --write
	dvc repro
	vapi summary

test: setup data     ## the default tests
	python -m pytest -m "not slow" -n 2 --dist worksteal

lint: setup          ## style and types
	ruff check .
	ruff format --check .
	mypy

evidence: setup data ## the measurements behind the README's numbers; resumable
	python benchmarks/evidence.py

setup: $(SETUP)

$(SETUP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit("vapi needs Python 3.11 or newer, $(PYTHON) is %d.%d; try: make PYTHON=python3.11" % sys.version_info[:2] if sys.version_info < (3, 11) else 0)'
	@$(PYTHON) -c 'import venv, ensurepip' || { echo "Python's venv is missing; on Debian: apt-get install python3-venv" >&2; exit 1; }
	$(PYTHON) -m venv .venv
	pip install --disable-pip-version-check --quiet --constraint constraints.txt --editable ".[dev]"
	@touch $(SETUP)

# Restores what is missing of data.dvc's files, without a network; stops at a file that somebody changed.
data: setup
	@dvc pull --remote bundled data.dvc || { echo "A file listed above is not the bundled one and was left alone. To work with it: dvc commit --force data.dvc" >&2; \
	  echo "To get the bundled one back, move yours away first." >&2; exit 1; }

# After `python -m vapi.digits` rebuilt the embedded data: write data.dvc and the bundled copy anew.
bundle: setup
	{ echo outs:; find data/digits data/models data/scenes -type f ! -name README.md | LC_ALL=C sort | \
	  while read -r file; do printf -- '- path: %s\n  remote: bundled\n' "$$file"; done; } > data.dvc
	dvc commit --quiet --force data.dvc
	rm -rf .dvc/bundled
	dvc push --quiet --remote bundled data.dvc
