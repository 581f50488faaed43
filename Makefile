PYTHON ?= python3
BIN := .venv/bin
INSTALLED := .venv/.installed
COMPILED := .venv/.compiled
KERNELS := fmt/_crc32c.pyx fmt/crc32c.h engine/model/_bits.pyx engine/model/bits.h engine/tracking/_marking.pyx \
	engine/tracking/marking.h engine/tracking/keeping.h
DECLARED := $(filter-out %/__init__.py,$(wildcard fmt/structures/*.py))
# Processes that run tests: one for each core, or so many. A test that is long begins while others still run.
WORKERS ?= auto
PARALLEL := -n $(WORKERS) --dist worksteal

.PHONY: help setup tools test test-long parsers vectors lint demo bench bench-serve bench-compare wheel clean
.NOTPARALLEL:

help: ## show these targets
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/make \1\t\2/p' $(MAKEFILE_LIST)

# Shell: installs the Debian packages in $missing where it may; else names them and fails.
install_missing = if [ -z "$$missing" ]; then :; \
	elif [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null; then \
		apt-get update -q && \
		DEBIAN_FRONTEND=noninteractive apt-get install -q -y --no-install-recommends $$missing; \
	else \
		echo "Please install these Debian packages first: $$missing" >&2; exit 1; \
	fi

setup: $(INSTALLED) $(COMPILED) .typeroot/dirtmap ## make .venv with dirtmap and everything its development needs
	@$(BIN)/python -m compileall -q fmt engine tools # as pip does with what it installs otherwise
	@if command -v nbdkit >/dev/null && [ -e /usr/include/nbdkit-filter.h ]; then \
		$(BIN)/dirtmap serve --filter-path >/dev/null; fi

$(INSTALLED): pyproject.toml
	@missing=; $(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || missing=python3-venv; \
	command -v gcc >/dev/null || missing="$$missing gcc libc6-dev"; \
	[ -e "$$($(PYTHON) -c 'import sysconfig; print(sysconfig.get_path("include"))')/Python.h" ] || \
		missing="$$missing python3-dev"; \
	$(install_missing)
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check --editable '.[dev]'
	@touch $@ $(COMPILED)

# The editable install has compiled them once; this is for what has changed since.
$(COMPILED): $(KERNELS) $(INSTALLED)
	$(BIN)/pip install --quiet --disable-pip-version-check --no-build-isolation --no-deps --editable .
	@touch $@

# Type checkers do not follow an editable install; they find dirtmap.fmt and its like here.
.typeroot/dirtmap:
	@mkdir -p $@
	@ln -s ../../fmt ../../engine ../../tools $@

# tests/tools.txt: a command and the Debian package it comes in, a line each.
tools: ## check for what the tests and the demo compare with, and make file systems with
	@PATH="$$PATH:/usr/sbin:/sbin"; missing=$$(while read -r command package; do \
		command -v "$$command" >/dev/null || echo "$$package"; \
	done <tests/tools.txt | sort -u | xargs); \
	[ -e /usr/include/nbdkit-filter.h ] || missing="$$missing nbdkit-plugin-dev"; $(install_missing)

test: setup tools ## run the tests, but for the longest
	$(BIN)/pytest $(PARALLEL) -m 'not long'

test-long: setup tools ## run all tests, exhaustive searches included
	$(BIN)/pytest $(PARALLEL) -o faulthandler_timeout=7200

parsers: setup ## write fmt/parsers anew, after a change of a declaration in fmt/structures
	@mkdir -p build; for file in $(DECLARED); do \
		$(BIN)/python -m dirtmap.fmt.generate "$$(basename $$file .py)" >build/parser.py && \
			mv build/parser.py "fmt/parsers/$$(basename $$file)" || exit 1; \
	done

vectors: setup ## make the test vectors in tests/vectors anew
	cd tests && ../$(BIN)/python -m vectors.make

lint: setup ## check style, types and who imports whom
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/lint-imports --no-logo

demo: setup tools ## see dirtmap at work on a qcow2 image and a raw disk
	@PATH="$(CURDIR)/$(BIN):$$PATH" sh demo.sh

bench: setup tools ## measure, side by side with what there is today, and write BENCHMARKS.md
	@mkdir -p build
	$(BIN)/pytest -o python_files='bench_*.py' --benchmark-columns=min,median,stddev,rounds \
		--benchmark-json=build/bench.json tests/bench
	$(BIN)/python tests/bench/report.py build/bench.json BENCHMARKS.md docs/benchmarks.svg

bench-serve: setup tools ## measure what the filter of `dirtmap serve` costs, for BENCHMARKS.md; TURNS=20 TURN_SECONDS=60 takes long
	@mkdir -p build
	TURNS='$(TURNS)' TURN_SECONDS='$(TURN_SECONDS)' $(BIN)/pytest -o python_files='serve_*.py' \
		-o faulthandler_timeout=36000 --benchmark-columns=median,rounds --benchmark-json=build/bench-serve.json tests/bench
	$(BIN)/python tests/bench/report_serve.py build/bench-serve.json BENCHMARKS.md

bench-compare: setup tools ## hold two commits side by side: make bench-compare A=COMMIT B=COMMIT [K=EXPRESSION]
	@$(BIN)/python tests/bench/compare.py '$(A)' '$(B)' '$(K)'

wheel: setup ## build dist/dirtmap-VERSION-*-manylinux*.whl and the sdist that it is made from
	rm -rf build/raw
	$(BIN)/python -m build --no-isolation --outdir build/raw
	mkdir -p dist && mv build/raw/*.tar.gz dist
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/auditwheel repair --strip --wheel-dir dist build/raw/*.whl

clean: ## remove all that make has made
	rm -rf .venv .typeroot build dist *.egg-info .benchmarks .hypothesis \
		.grimp_cache .import_linter_cache .mypy_cache .pytest_cache .ruff_cache \
		fmt/_crc32c.c fmt/_crc32c.*.so engine/model/_bits.c engine/model/_bits.*.so \
		engine/tracking/_marking.c engine/tracking/_marking.*.so
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
