# The verbs of this repository; `make` alone lists them. Everything runs through uv in `.venv`.
.DEFAULT_GOAL := help
.PHONY: help install test lint types format quickstart docs constraints build clean ci

RUN := uv run --no-sync

help:  ## List the verbs
	@grep -hE '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

install:  ## Set up .venv for development, with the tested versions
	uv venv --allow-existing
	uv pip install -c constraints.txt -e ".[cpu,openvino,synthesis,station]" --group dev

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

constraints:  ## Pin the newest versions that resolve on every supported Python
	{ \
	  echo '# Tested versions of everything this package and its extras cpu, openvino, synthesis and station, the tests and the'; \
	  echo '# documentation need, for every supported Python and platform. Regenerate with `make constraints`, then run the tests.'; \
	  uv pip compile pyproject.toml --universal --python-version 3.10 --upgrade --quiet --no-header --no-annotate \
	    --extra cpu --extra openvino --extra synthesis --extra station --group dev --group docs; \
	} > constraints.txt.new
	mv constraints.txt.new constraints.txt

build:  ## Build the wheel and the source archive into dist/
	uv build

clean:  ## Remove what the tools and builds leave behind (not .venv, not results)
	rm -rf build dist .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find src tests benchmarks -name __pycache__ -type d -prune -exec rm -rf {} +

ci:  ## Do what continuous integration does, in an environment of its own
	.ci/run
