# Temper: post-train a small language model to reason, and hand back GGUF files and an Ollama Modelfile.
#
#   make all                               every stage, for the embedded tiny model
#   make all RECIPE=tiny-gsm8k DATA=...    the same for another recipe, from a local copy of its data
#   make help                              targets, options and recipes
#
# This file is the pipeline: the only place that knows the order of the stages. A stage is finished exactly when its
# folder in artifacts/<recipe>/ holds manifest.json, so that file is the target. Make decides by time whether to run a
# stage; the stage then looks whether its recipe tables, inputs and code really changed, and if not is done in a moment.

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DELETE_ON_ERROR:
.NOTPARALLEL:
.SUFFIXES:
.DEFAULT_GOAL := help
MAKEFLAGS += --no-builtin-rules

RECIPE ?= tiny
RUNTIME ?=
DATA ?=
VENV ?= .venv
PYTHON ?= python3
export PYTHON TORCH_INDEX
# Threads that wait do so asleep: spinning, as is the default, makes a shared CPU up to eight times slower.
export OMP_WAIT_POLICY ?= PASSIVE
Q ?= What is 17 + 25?
SUBSET ?=

# ---- what was asked for -------------------------------------------------------------------------------------------

recipe := recipes/$(RECIPE).toml
recipes := $(patsubst recipes/%.toml,%,$(wildcard recipes/*.toml))
ifeq ($(filter $(RECIPE),$(recipes)),)
  $(error RECIPE=$(RECIPE): there is no $(recipe). Recipes: $(recipes))
endif
ifneq ($(filter-out local docker,$(RUNTIME)),)
  $(error RUNTIME=$(RUNTIME) is not known. Expected local or docker)
endif
ifeq ($(RUNTIME),docker)
  $(error RUNTIME=docker: this version has no images yet. Use RUNTIME=local)
endif
ifneq ($(DATA),)
  ifeq ($(wildcard $(DATA)),)
    $(error DATA=$(DATA): there is no such file or folder)
  endif
endif

# ---- how a stage runs ---------------------------------------------------------------------------------------------

out := artifacts/$(RECIPE)
ready := $(VENV)/installed
python := $(VENV)/bin/python
lib := $(wildcard stages/lib/*.py)

# $(call stage,name): run a stage on this recipe, with the folders of its inputs, into its own.
stage = $(python) -m stages.$(subst -,_,$(1)) --recipe $(recipe)
# $(call given,names): "--name folder" for each finished stage that is an input.
given = $(foreach name,$(1),--$(name) $(out)/$(name))
done = $(foreach name,$(1),$(out)/$(name)/manifest.json)

# Only a recipe with a [base_model] table makes its own base model; every stage that loads the model then reads it.
base := $(if $(shell grep -l '^\[base_model\]' $(recipe)),base-model)

.PHONY: all help test clean setup ask ollama FORCE
stages := base-model prepare-data sft score-base grpo infer merge gguf ollama-modelfile
.PHONY: $(stages)
# A manifest is never half written: make, interrupted in the moment after one appeared, must not delete it.
.PRECIOUS: $(call done,$(stages))

all: infer ollama-modelfile  ## Run every stage whose inputs changed
	@echo "$(out)/ollama-modelfile/Modelfile and the GGUF files in $(out)/gguf are ready. Try: make ask RECIPE=$(RECIPE)"

# ---- the graph ----------------------------------------------------------------------------------------------------

base-model: $(call done,base-model)  ## Make the embedded tiny base model (recipes with a [base_model] table)
prepare-data: $(call done,prepare-data)  ## Turn problems into the sft, grpo and eval sets
sft: $(call done,sft)  ## Fine-tune on worked solutions
score-base: $(call done,score-base)  ## Sample before GPU hours are spent: do the rewards tell completions apart?
grpo: $(call done,grpo)  ## Improve with GRPO and verifiable rewards (SUBSET=1: on what score-base chose)
infer: $(call done,infer)  ## Examine base, SFT and GRPO model on held-out problems
merge: $(call done,merge)  ## Fold the adapter into 16-bit safetensors, and prove it
gguf: $(call done,gguf)  ## Make the GGUF files, and prove them
ollama-modelfile: $(call done,ollama-modelfile)  ## Write the Ollama Modelfile, and prove it

$(call done,base-model): stages/base_model.py
	$(call stage,base-model) --out $(@D)

$(call done,prepare-data): stages/prepare_data.py $(call done,$(base)) $(out)/data.path
	$(call stage,prepare-data) $(call given,$(base)) $(if $(data),--data $(data)) --out $(@D)

$(call done,sft): stages/sft.py $(call done,$(base) prepare-data)
	$(call stage,sft) $(call given,$(base) prepare-data) --out $(@D)

# Its verdict stands in the finished artifact, and it fails again each time it is asked while that is a bad one.
$(call done,score-base): stages/score_base.py $(call done,$(base) prepare-data sft) FORCE
	$(call stage,score-base) $(call given,$(base) prepare-data sft) --out $(@D)

subset := $(if $(SUBSET),score-base)
$(call done,grpo): stages/grpo.py $(call done,$(base) prepare-data sft $(subset))
	$(call stage,grpo) $(call given,$(base) prepare-data sft $(subset)) --out $(@D)

$(call done,infer): stages/infer.py $(call done,$(base) prepare-data sft grpo)
	$(call stage,infer) $(call given,$(base) prepare-data sft grpo) --out $(@D)

$(call done,merge): stages/merge.py $(call done,$(base) prepare-data grpo)
	$(call stage,merge) $(call given,$(base) prepare-data grpo) --out $(@D)

$(call done,gguf): stages/gguf.py $(call done,prepare-data merge)
	$(call stage,gguf) $(call given,prepare-data merge) --out $(@D)

$(call done,ollama-modelfile): stages/ollama_modelfile.py $(call done,merge gguf)
	$(call stage,ollama-modelfile) $(call given,merge gguf) --out $(@D)

# Every stage is looked at again when the recipe or shared code changes; set-up only has to have been.
$(call done,$(stages)): $(recipe) $(lib) | $(ready)

# Where DATA pointed the last time it was given: it stays so, and another place is new input, however old its files are.
data = $(or $(DATA),$(shell cat $(out)/data.path 2> /dev/null))
$(out)/data.path: FORCE
	@mkdir -p $(@D)
	@if [[ ! -e $@ || ( -n "$(DATA)" && "$$(cat $@)" != "$(DATA)" ) ]]; then echo "$(DATA)" > $@; fi

# ---- with the result ----------------------------------------------------------------------------------------------

ask: $(call done,gguf)  ## Ask the finished GGUF: make ask Q="What is 17 + 25?"
	@$(call stage,ask) $(call given,gguf) --question "$$QUESTION"
ask: export QUESTION = $(Q)

ollama: $(call done,ollama-modelfile)  ## Hand the model to Ollama and ask it one question
	@$(call stage,ollama) $(call given,ollama-modelfile)

# ---- housekeeping -------------------------------------------------------------------------------------------------

setup: $(ready)  ## Make the virtual environment (the other targets do it when it is missing)

$(ready): docker/install docker/cpu.lock docker/cpu-cuda.lock
	docker/install $(VENV)

test: $(ready)  ## Run the tests
	$(python) -m pytest $(TESTS)

clean:  ## Delete this recipe's artifacts (downloads and the virtual environment stay)
	rm -rf $(out)

help:  ## Show this
	@echo "make TARGET [RECIPE=$(RECIPE)] [RUNTIME=local] [DATA=a dataset's file or folder] [TORCH_INDEX=address]"; echo
	@awk -F ':.*##' '/^[a-z-]+:.*##/ { printf "  %-18s%s\n", $$1, $$2 }' Makefile; echo
	@echo "Recipes:"; for each in $(recipes); do printf '  %-18s %s\n' "$$each" "$$(sed -n '1s/^# *//p' "recipes/$$each.toml")"; done
