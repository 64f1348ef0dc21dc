# make test        run all checks but the slow ones (a cluster, compilers, a browser); ALL=1: all of them, as CI does
# make test-lab    run only the notebooks in JupyterLab, in a real browser (needs chromium and chromedriver)
# make reproduce   SCALE=smoke|laptop|workstation|paper DATA=synthetic|naip-trees|ag-net|agrivision-{2020,2021,cvpr2020} DATA_ROOT=DIR OUT=DIR TABLES="..." AT_ONCE=N
# make notebooks   run every notebook, save its outputs, export the package and README.md
# make export      clean the notebooks, export the package and README.md without running anything
# make docs        build the site in _docs/: every notebook with its saved outputs, and the API; no external resources
# make bench       time the optimized code against plain implementations and public libraries
# make gpu-check   check a GPU's correctness and speed in a few minutes
SCALE     ?= laptop
DATA      ?= synthetic
DATA_ROOT ?=
OUT       ?= out
SEEDS     ?= 0
DEVICE    ?= auto
TABLES    ?=
AT_ONCE   ?= 0
ALL       ?=
PYTHON    ?=
PIP_ARGS  ?=
VENV      ?= .venv
BIN       := $(VENV)/bin

.PHONY: test test-lab reproduce notebooks export docs results gpu-check bench clean

$(VENV)/.ready: settings.ini setup.py pyproject.toml constraints.txt tools/make_venv.sh
	@PYTHON="$(PYTHON)" PIP_ARGS="$(PIP_ARGS)" sh tools/make_venv.sh $(VENV)
	@touch $@

# pytest takes the runs that the notebooks trained instead of training them again
test: $(VENV)/.ready
	$(BIN)/python tools/check_in_step.py
	$(BIN)/ruff check .
	$(BIN)/lint-imports --no-cache
	$(BIN)/python tools/run_nbdev_test.py --out build/smoke
	SMOKE=build/smoke $(BIN)/python -m pytest -q -n 2 --dist loadfile --no-loadscope-reorder $(if $(ALL),,-m "not slow and not lab")

test-lab: $(VENV)/.ready
	$(BIN)/python -m pytest -q -rs -n 0 tests/repository/test_lab.py

reproduce: $(VENV)/.ready
	$(BIN)/agrivision reproduce $(TABLES) --scale $(SCALE) --data $(DATA) --data-root "$(DATA_ROOT)" --out "$(OUT)" --seeds "$(SEEDS)" --device $(DEVICE) --at-once $(AT_ONCE)

notebooks: $(VENV)/.ready
	$(BIN)/python tools/export.py --run

export: $(VENV)/.ready
	$(BIN)/python tools/export.py

docs: $(VENV)/.ready
	$(BIN)/python docs/build.py

# norms, losses and the first steps of the paper's training on a GPU; writes gpu.json
gpu-check: $(VENV)/.ready
	$(BIN)/python benchmarks/gpu.py --out gpu.json

# about 15 minutes on an idle machine; nbs/benchmarks.ipynb shows the results
bench: $(VENV)/.ready
	for name in data norms network losses training divergence; do $(BIN)/python benchmarks/$$name.py --json benchmarks/results/$$name.json || exit 1; done
	$(BIN)/python tools/export.py --run benchmarks

# results/: every table on three data sets with three seeds, six hours on two cores, resumable; AG_NET and NAIP are folders of the open data
results: $(VENV)/.ready
	$(BIN)/agrivision reproduce section7_trained --seeds 0,1,2 --data ag-net --data-root "$(AG_NET)" --out out/ag-net
	for data in "ag-net $(AG_NET)" "naip-trees $(NAIP)" synthetic; do set -- $$data; \
	  $(BIN)/agrivision reproduce --seeds 0,1,2 --data $$1 --data-root "$$2" --out out/$$1 && \
	  $(BIN)/python tools/collect_results.py out/$$1 $$1 --data $$1 --data-root "$$2" || exit 1; done
	$(BIN)/python tools/export.py --run index

clean:
	rm -rf $(VENV) build _docs *.egg-info
