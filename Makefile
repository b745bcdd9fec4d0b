# Attention Lab: `make book` and `make test` are all a reader needs; `make help` lists the rest.
PYTHON ?= python3
VENV   := .venv
RUN    := $(VENV)/bin/python

.PHONY: help setup book test chapter lab serve new-chapter lock clean
.DEFAULT_GOAL := help

help:
	@echo "make book                                    set up, execute what changed, render _build/html/index.html"
	@echo "make test                                    set up, run every check, every chapter and the book in a browser"
	@echo "make chapter SLUG=circuits/circuit-reuse     one chapter and its page, the five-minute look"
	@echo "make lab                                     JupyterLab on the workspace"
	@echo "make serve                                   the rendered book on http://localhost:8000"
	@echo "make new-chapter PART=... SLUG=...           a chapter's five files from templates"
	@echo "make lock                                    resolve pyproject.toml again into requirements.lock and environment.yml"
	@echo "make clean                                   remove what was built (make clean VENV_TOO=1: the environment too)"

setup:
	@PYTHON=$(PYTHON) sh tools/setup.sh $(VENV)

book: setup
	@$(RUN) -m tools.execute && $(RUN) -m tools.book

test: setup
	@$(RUN) -m tools.check

chapter: setup
	@test -n "$(SLUG)" || { echo "error: which chapter? make chapter SLUG=circuits/circuit-reuse"; exit 2; }
	@$(RUN) -m tools.execute $(SLUG) && $(RUN) -m tools.book --missing-ok
	@echo "page: _build/html/notebooks/$(SLUG).html"

lab: setup
	@$(VENV)/bin/jupyter lab --notebook-dir=.

serve: setup
	@test -f _build/html/index.html || { echo "error: no book yet; run make book first"; exit 2; }
	@$(RUN) -m http.server 8000 --bind 127.0.0.1 --directory _build/html

new-chapter: setup
	@$(RUN) -m tools.new_chapter "$(PART)" "$(SLUG)"

lock: setup
	@$(RUN) -m tools.lock

clean:
	rm -rf _build dist .mypy_cache .ruff_cache .pytest_cache .import_linter_cache $(if $(VENV_TOO),$(VENV))
