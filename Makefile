# `make` alone shows this help. PYTHON chooses the interpreter that makes .venv, as: make install PYTHON=python3.12
PYTHON ?= python3
TORCH ?= torch==2.13.0
BRANCH ?= physics
QUESTION ?= ¿Qué es la energía cinética y de qué depende?
export PIP_DISABLE_PIP_VERSION_CHECK := 1
# Python compiles what is imported when it is; compiling all of torch beforehand takes over a minute. It must keep it,
# though many containers tell it not to: torch, transformers and PEFT take 23 seconds to import, 10 once compiled.
export PIP_COMPILE := 0
unexport PYTHONDONTWRITEBYTECODE

BIN := .venv/bin
PIP := $(BIN)/python -m pip install --quiet --constraint constraints.txt

.DEFAULT_GOAL := help
.PHONY: help install demo demo-omega train list-branches lint test audit clean

help: ## Muestra esta ayuda
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 18

.venv/installed: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Hace falta Python 3.11 o posterior: make install PYTHON=python3.12")'
	$(PYTHON) -m venv .venv
	$(PIP) '$(TORCH)'
	$(PIP) --editable .
	touch $@

.venv/installed-dev: .venv/installed
	$(PIP) --editable '.[dev]'
	touch $@

.venv/installed-audit: .venv/installed
	$(PIP) --editable '.[audit]'
	touch $@

install: .venv/installed ## Crea .venv, instala y prepara el modelo base
	@$(BIN)/sheily models get smollm2-135m

demo: install ## Entrena la rama physics y compara base y especialista
	@$(BIN)/sheily train --branch physics --lora --epochs 1 --batch-size 2 --lr 2e-3
	@$(BIN)/sheily ask physics "$(QUESTION)" --compare --max-tokens 120

demo-omega: export SHEILY_HOME := $(CURDIR)/var/demo-omega
demo-omega: .venv/installed ## Entrena OMEGA 21 en un trabajador en esta misma máquina
	@umask 077; mkdir -p "$$SHEILY_HOME"; log="$$SHEILY_HOME/worker.log"; : > "$$log"; \
	$(BIN)/sheily worker --port 0 > "$$log" 2>&1 & worker=$$!; \
	trap 'kill $$worker 2> /dev/null; wait $$worker' EXIT; trap 'exit 130' INT TERM; \
	until address=$$(grep -m 1 '^http' "$$log"); do \
	  kill -0 $$worker 2> /dev/null || { cat "$$log"; exit 1; }; sleep 0.2; \
	done; \
	$(BIN)/python sheily_train/colab/ejemplo_integracion_completa.py "$$address"

train: install ## Entrena una rama: make train BRANCH=sports
	@$(BIN)/sheily train --branch $(BRANCH) --lora

list-branches: .venv/installed ## Muestra las ramas
	@$(BIN)/sheily branches list

lint: .venv/installed-dev ## ruff y mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

test: lint ## Toda la batería de pruebas, desde cero
	$(BIN)/pytest --numprocesses 3 --dist loadfile --no-loadscope-reorder --cov --cov-report=term

audit: .venv/installed-audit ## Busca fallos de seguridad conocidos en las versiones probadas (pide internet)
	$(BIN)/pip-audit --requirement constraints.txt --no-deps --disable-pip --progress-spinner off

clean: ## Borra .venv y lo que dejan las pruebas
	rm -rf .venv .coverage* .mypy_cache .pytest_cache .ruff_cache .hypothesis
