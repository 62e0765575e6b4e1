# Everything happens in .venv, which is made when it is needed. `make` alone prints the targets.
PYTHON ?= $(firstword $(wildcard $(shell command -v python3.11 || true)) python3)
BIN = .venv/bin
READY = .venv/ready

help:  ## this list
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "  make %-9s%s\n", $$1, $$2 }' Makefile

run: $(READY)  ## the tour: the embedded model through SFT, DPO and GRPO
	$(BIN)/polm run tour

test: $(READY)  ## all that proves the project: lint, notebooks clean, export in sync, notebooks run, tests pass
	$(BIN)/ruff check nbs tests benchmarks
	$(BIN)/ruff format --check --quiet nbs tests benchmarks
	$(BIN)/python tests/readable.py
	$(BIN)/python tests/tree.py
	place=$$(mktemp -d) && TMPDIR=$$place POLM_RUNS=$$place/runs POLM_CLAIMS=required POLM_CHROMIUM=none OMP_NUM_THREADS=1 $(BIN)/nbdev_test --n_workers 2 --do_print --skip_file_re "$$($(BIN)/python tests/pages.py)" && rm -r $$place
	OMP_NUM_THREADS=1 $(BIN)/pytest -n 2 --dist loadfile --no-loadscope-reorder --durations=50

quick: $(READY)  ## in three minutes: lint, export in sync, rules of the tree, fast tests, the notebooks touched since main
	$(BIN)/ruff check nbs tests benchmarks
	$(BIN)/ruff format --check --quiet nbs tests benchmarks
	$(BIN)/python tests/readable.py
	$(BIN)/python tests/tree.py
	OMP_NUM_THREADS=1 $(BIN)/pytest -q -n 2 --dist loadfile @tests/fast.txt
	$(BIN)/python tests/page.py --touched

page: $(READY)  ## one page, P=alignment/dpo: exported, run, its tests, rendered
	$(BIN)/python tests/page.py "$(P)"

hidden: $(READY)  ## the tests that look at bubblewrap, a browser and Quarto, where none of them is
	OMP_NUM_THREADS=1 $(BIN)/python tests/without.py bwrap chromium chromium-browser google-chrome google-chrome-stable quarto -- $(BIN)/pytest -n 2 --dist loadfile $$($(BIN)/python tests/pages.py --hidden)

picture: $(READY)  ## the picture of the workbench in the README, from a real run
	$(BIN)/python tests/picture.py

mutate: $(READY)  ## faults are put into a copy of the package, one by one; those that no test sees are listed
	$(BIN)/python tests/mutate.py

outputs: $(READY)  ## notebooks executed, and their outputs stored
	$(BIN)/polm_site execute $(PAGES)

real: $(READY)  ## every method on a real chat model, whose results are not kept yet; hours
	$(BIN)/polm get smol minilm
	$(BIN)/polm_site real

lab: $(READY)  ## JupyterLab on the front page
	$(BIN)/polm lab

docs: $(READY)  ## the site in _docs, where Quarto is installed
	$(BIN)/polm_site build

bench: $(READY)  ## speed and memory, side by side with peers
	$(BIN)/python benchmarks/run.py

$(READY): settings.ini setup.py constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet -c constraints.txt -e ".[dev]"
	touch $(READY)

.PHONY: help run test quick page hidden picture mutate outputs real lab docs bench
