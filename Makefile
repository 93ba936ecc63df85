# make demo   trains a small network with torch.optim and with fastcurv, and times an optimizer step
# make test   the test suite and the examples in the documentation
# make bench  measures what bench/targets.toml promises on this machine
# make lint   style and types, and the schemas of workflows, issue forms and the citation
#
# Everything is set up in .venv. On a machine that cannot fetch, name an interpreter that has torch (and, for `make test`,
# the packages of the extra `dev`): make test PYTHON=python3

# A variable that is set to nothing counts as unset.
TORCH := $(or $(TORCH),torch==2.13.0)
BOOTSTRAP := $(or $(BOOTSTRAP),python3)

ifdef PYTHON
python := $(PYTHON)
clang-format := clang-format
demo := build/.given
dev := build/.given
else
python := .venv/bin/python
clang-format := .venv/bin/clang-format
demo := .venv/.demo
dev := .venv/.dev
endif

# Installed once: what an isolated build compiles, the next build would compile again.
build_requires = import tomllib; print(*tomllib.load(open("pyproject.toml", "rb"))["build-system"]["requires"])

# A step is bound by memory, a test by Python: threads only get into each other's way.
export OMP_NUM_THREADS := $(or $(OMP_NUM_THREADS),1)

# For the machine at hand: CUDA kernels take minutes to compile, and the gates of `make test` compile each of them.
export FASTCURV_CUDA := $(or $(FASTCURV_CUDA),$(if $(wildcard /dev/nvidiactl),auto,0))

.PHONY: demo test bench lint build clean

demo: $(demo)
	OMP_NUM_THREADS=$$(nproc) $(python) -m fastcurv.cli demo

test: $(dev) build
	$(python) -m pytest tests -n auto --dist loadfile --no-loadscope-reorder
	$(python) -m pytest --doctest-modules fastcurv --doctest-ignore-import-errors -p no:cacheprovider

bench: $(dev) build
	OMP_NUM_THREADS=$$(nproc) $(python) -m fastcurv.cli bench --check

lint: $(dev)
	$(python) -m ruff check .
	$(python) -m ruff format --check .
	$(python) -m mypy
	$(clang-format) --dry-run --Werror $$(git ls-files '*.cpp' '*.cu' '*.cuh' '*.h')
	$(python) -m check_jsonschema --builtin-schema vendor.github-workflows .github/workflows/*.yml
	$(python) -m check_jsonschema --builtin-schema vendor.github-issue-config .github/ISSUE_TEMPLATE/config.yml
	$(python) -m check_jsonschema --builtin-schema vendor.github-issue-forms .github/ISSUE_TEMPLATE/[!c]*.yml
	$(python) -m check_jsonschema --builtin-schema vendor.citation-file-format CITATION.cff

# Compiles what changed since; without changes it takes half a second.
build: $(dev)
	$(python) setup.py -q build_ext --inplace

.venv/.base:
	$(BOOTSTRAP) -m venv .venv
	.venv/bin/python -m pip install -q "$(TORCH)"
	.venv/bin/python -c '$(build_requires)' | xargs .venv/bin/python -m pip install -q
	touch $@

.venv/.demo: .venv/.base pyproject.toml
	.venv/bin/python -m pip install -q --no-build-isolation -e '.[demo]'
	touch $@

.venv/.dev: .venv/.base pyproject.toml
	.venv/bin/python -m pip install -q --no-build-isolation -e '.[dev]'
	touch $@

build/.given: pyproject.toml
	$(python) -m pip install -q --no-build-isolation --no-deps -e .
	mkdir -p build && touch $@

clean:
	rm -rf build dist .venv *.egg-info fastcurv/*.so
