# The verbs of this repository; `make` alone lists them. Everything runs through uv in `.venv`.
.DEFAULT_GOAL := help
.PHONY: help install test lint types format quickstart docs docs-commands constraints build clean ci

RUN := uv run --no-sync

help:  ## List the verbs
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 16

install:  ## Set up .venv for development, with the tested versions
	uv venv --allow-existing
	uv pip install --compile-bytecode -c constraints.txt -e ".[annotations,cpu,openvino,station,synthesis]" --group dev

test:  ## Run the tests; `make test only="-k coreset"` runs some of them
	$(RUN) pytest $(only)

lint:  ## Check style and formatting
	$(RUN) ruff check
	$(RUN) ruff format --check

types:  ## Check types
	$(RUN) mypy

format:  ## Rewrite the files in the project's style
	$(RUN) ruff check --fix
	$(RUN) ruff format

quickstart:  ## Train and test on the small sample that comes with the package
	$(RUN) anomalib train --config configs/quickstart.yaml

docs:  ## Build the documentation as a site into site/
	uv pip install -c constraints.txt --group docs
	$(RUN) mkdocs build --strict

docs-commands:  ## Run every command of README and documentation on small data, and name those that are only parsed
	$(RUN) pytest -n 0 -v tests/test_docs_commands.py

constraints:  ## Pin the newest versions that resolve on every supported Python
	{ \
	  echo '# Tested versions of everything this package and its extras annotations, cpu, openvino, station and synthesis, the tests and the documentation need,'; \
	  echo '# for every supported Python and platform. Regenerate with `make constraints`, then run the tests.'; \
	  uv pip compile pyproject.toml --universal --python-version 3.10 --upgrade --quiet --no-header --no-annotate \
	    --extra annotations --extra cpu --extra openvino --extra station --extra synthesis --group dev --group docs; \
	} > constraints.txt.new
	mv constraints.txt.new constraints.txt

build:  ## Build wheel and source archive into dist/, check them, and run the wheel in a fresh environment
	.ci/package

clean:  ## Remove what the tools and builds leave behind (not .venv, not results)
	rm -rf build dist .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find src tests benchmarks -name __pycache__ -type d -prune -exec rm -rf {} +

ci:  ## Do what continuous integration does, in an environment of its own
	.ci/run
