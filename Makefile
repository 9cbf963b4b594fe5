# A thin front: each target is a line or two that you could type.
export PYINFRA_YES = 1
VENV = .venv/bin

.PHONY: help up down clean lint unit test faults

help: ## Show this
	@sed -n 's/^\([a-z]*\):.*## /make \1\t/p' Makefile
	@echo 'Settings of make up, remembered until make down, and their defaults:'
	@echo '  WORKERS=3 PROXIES=1 PROVIDER=docker HTTP_PORT=8080 NETWORK=192.168.56 SCHEDULER=nomad'

up: ## From a bare machine to the app at http://localhost:8080; does only what is missing
	python3 -m lab.up

down: ## Remove the hosts, their networks and volumes
	python3 -m lab.down

clean: ## That, and the images, .venv, and what was downloaded or built
	python3 -m lab.down --clean

.venv/made-from: requirements.txt requirements-dev.txt
	python3 -c 'from lab import controller; controller.make_venv()'

lint: .venv/made-from ## ruff, mypy, shellcheck
	$(VENV)/ruff check .
	$(VENV)/ruff format --check .
	$(VENV)/mypy .
	git ls-files -co --exclude-standard | xargs grep -lE '^#!/bin/(ba)?sh' | xargs -r $(VENV)/shellcheck

unit: .venv/made-from ## Tests that need no hosts
	$(VENV)/pytest

test: lint unit ## All that can be checked: linters, unit tests, and the lab with each scheduler
	python3 -m lab.test

faults: .venv/made-from ## Break everything that can break, under load, in the lab that is up
	$(VENV)/pytest tests/faults --durations=0
