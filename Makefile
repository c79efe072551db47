# Temper: post-train a small language model to reason, and hand back GGUF files and an Ollama Modelfile.
#
#   make all                               every stage, for the embedded tiny model
#   make all RECIPE=tiny-gsm8k DATA=...    the same for another recipe, from a local copy of its data
#   make all RUNTIME=local                 in a virtual environment, also where a container engine answers
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
DOCKER ?= docker
GPUS ?=
CA_BUNDLE ?=
MOUNT ?=
export PYTHON TORCH_INDEX DOCKER
# Threads that wait do so asleep: spinning, as is the default, makes a shared CPU up to eight times slower.
export OMP_WAIT_POLICY ?= PASSIVE
Q ?= What is 17 + 25?
SUBSET ?=
PORT ?= 8000
HUB ?=
PUBLIC ?=
WHAT ?=
YES ?=

# ---- what was asked for -------------------------------------------------------------------------------------------

# $(call quoted,text): as one word for the shell, whatever is in it.
quoted = '$(subst ','\'',$(1))'

recipe := recipes/$(RECIPE).toml
recipes := $(patsubst recipes/%.toml,%,$(wildcard recipes/*.toml))
ifneq ($(words $(RECIPE)),1)
  $(error RECIPE=$(RECIPE): expected the name of one recipe. Recipes: $(recipes))
endif
ifneq ($(filter $(RECIPE),$(recipes)),$(strip $(RECIPE)))
  $(error RECIPE=$(RECIPE): there is no $(recipe). Recipes: $(recipes))
endif
ifneq ($(filter-out local docker,$(RUNTIME)),)
  $(error RUNTIME=$(RUNTIME) is not known. Expected local or docker)
endif
ifneq ($(GPUS),)
  ifeq ($(shell [[ "$(GPUS)" =~ ^(all|none|[0-9]+(,[0-9]+)*)$$ ]] && echo ok),)
    $(error GPUS=$(GPUS) is not known. Expected all, none, or device numbers: 0 or 0,1)
  endif
endif
ifneq ($(filter-out cpu cuda,$(IMAGE)),)
  $(error IMAGE=$(IMAGE) is not known. Expected cpu or cuda)
endif
$(foreach name,PUBLIC SUBSET YES,$(if $(filter-out 1,$($(name))),$(error \
  $(name)=$($(name)) is not known. Expected 1, or leave it out)))
ifneq ($(DATA),)
  ifneq ($(words $(DATA)),1)  # docker/run takes what it mounts apart at blanks
    $(error DATA=$(DATA): has a blank in it. Rename it, or name a link to it: ln -s)
  endif
  # As not every shell does after "DATA=":
  override DATA := $(patsubst ~/%,$(HOME)/%,$(DATA))
  ifeq ($(shell test -e $(call quoted,$(DATA)) && echo ok),)
    $(error DATA=$(DATA): there is no such file or folder)
  endif
endif
ifneq ($(filter push,$(MAKECMDGOALS)),)
  ifeq ($(HUB),)
    $(error make push needs a repository's name on the hub: make push HUB=user/name)
  endif
endif

comma := ,

# ---- where a stage runs -------------------------------------------------------------------------------------------

# In a container if an engine answers, with the GPUs if it can hand them over; else in the virtual environment. Targets
# that start no stage do not ask.
ifneq ($(filter-out help clean setup check test lock doctor,$(or $(MAKECMDGOALS),help)),)
  ifeq ($(RUNTIME),)
    override RUNTIME := $(if $(shell timeout 10 $(DOCKER) info > /dev/null 2>&1 && echo yes),docker,local)
    chosen := yes
  endif
  ifneq ($(filter docker,$(RUNTIME))$(filter image,$(MAKECMDGOALS)),)
    ifeq ($(GPUS),)
      nvidia := $(shell { $(DOCKER) info --format '{{json .Runtimes}}' | grep nvidia || \
          command -v nvidia-container-runtime-hook || ls /etc/cdi /var/run/cdi | grep nvidia; } 2> /dev/null)
      override GPUS := $(if $(nvidia),all,none)
    endif
    IMAGE ?= $(if $(filter none,$(GPUS)),cpu,cuda)
  endif
  ifdef chosen  # on standard error: standard output is for what a stage says
    chosen := $(if $(filter docker,$(RUNTIME)),$(DOCKER) answers; image $(IMAGE)$(comma) GPUS=$(GPUS),no container \
      engine answers ($(DOCKER)); $(VENV))
    said := $(shell echo 'RUNTIME=$(RUNTIME): $(chosen)' >&2)
  endif
endif

out := artifacts/$(RECIPE)
lib := $(wildcard stages/lib/*.py stages/lib/*/*.py)
ifeq ($(RUNTIME),docker)
  IMAGE_FILE := data/cache/image-$(IMAGE)
  ready := $(IMAGE_FILE)
  python = docker/run python
  export IMAGE_FILE GPUS CA_BUNDLE MOUNT
else
  ready := $(VENV)/installed
  python := $(VENV)/bin/python
  ifneq ($(filter-out all,$(GPUS)),)
    export CUDA_VISIBLE_DEVICES := $(filter-out none,$(GPUS))
  endif
endif

# $(call stage,name): run a stage on this recipe, with the folders of its inputs, into its own.
stage = $(python) -m stages.$(subst -,_,$(1)) --recipe $(recipe)
# For what looks at the machine itself, before anything is installed or built if need be: it asks for no more than click.
on_host = $(or $(firstword $(shell for each in $(VENV)/bin/python $(PYTHON); do \
  "$$each" -c 'import click, tomllib' 2> /dev/null && echo "$$each"; done; true)),$(error \
  $(PYTHON) has no click. Run: $(PYTHON) -m pip install click, or: make setup))
# $(call given,names): "--name folder" for each finished stage that is an input.
given = $(foreach name,$(1),--$(name) $(out)/$(name))
done = $(foreach name,$(1),$(out)/$(name)/manifest.json)

# Only a recipe with a [base_model] table makes its own base model; every stage that loads the model then reads it.
define newline


endef
text := $(newline)$(file < $(recipe))
base := $(if $(findstring $(newline)[base_model],$(text)),base-model)

# $(call kept,NAME,file): what NAME is, or if it was not given, what it was the last time; NAME= forgets that.
kept = $(or $($(1)),$(if $(filter command,$(origin $(1))),,$(file < $(out)/$(2))))
data := $(call kept,DATA,data.path)
subset := $(call kept,SUBSET,subset)

# The stages that read files from outside, if one of those changed since they finished: the recipe's data and model on
# this disk, DATA, rewards of one's own. Make could hold no name with a blank in it, so find looks. It goes by ctime, as
# a file that is moved or unpacked over another keeps an old mtime; a folder changes when a file in it comes or goes.
named = awk '/^ *\[/ { here = /^ *\[(\[ *data\.sources|model\])/ } \
  here && sub(/^ *name *= *"/, "") { sub(/".*/, ""); print } \
  here && sub(/^ *name *= *\047/, "") { sub(/\047.*/, ""); print }' $(recipe)
finished := $(call quoted,$(CURDIR)/$(out))
caches := -path data/cache -o -path $(call quoted,$(CURDIR)/data/cache)
changed := $(shell \
  mapfile -t names < <($(named)); \
  names+=($(if $(data),$(call quoted,$(data)))); \
  [[ $${names[*]} = '' || -z $$(find -L "$${names[@]}" \( $(caches) \) -prune \
    -o -cnewer $(finished)/prepare-data/manifest.json -print -quit 2> /dev/null) ]] || echo prepare-data)
ifneq ($(findstring .py:,$(text)),)  # "FILE.py:FUNCTION", from the recipe's folder
  changed += $(shell \
    cd recipes; mapfile -t names < <(grep -oE "[^\"']+\.py:" ../$(recipe)); \
    for stage in score-base grpo; do \
      [[ -z $$(find -L "$${names[@]%:}" -cnewer $(finished)/$$stage/manifest.json 2> /dev/null) ]] || echo $$stage; \
    done)
endif
ifneq ($(data),$(file < $(out)/data.path))
  changed += prepare-data
endif

# A container sees what the recipe names on this disk, wherever it lies; names with a blank or a comma would be taken apart.
override MOUNT := $(strip $(MOUNT) $(shell $(named) | while read -r name; do \
  [[ $$name = *[[:blank:],]* || ! -e $$name ]] || echo "$$name"; done))

.PHONY: all help check test test-gpu clean setup ask chat serve push ollama image shell lock sbom doctor FORCE
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

# Where DATA pointed is kept when the stage has succeeded with it: a wrong one is forgotten.
$(call done,prepare-data): stages/prepare_data.py $(call done,$(base))
	@$(if $(data),test -e $(call quoted,$(data)) || { echo $(call quoted,$(gone)) >&2; exit 1; })
	$(call stage,prepare-data) $(call given,$(base)) $(if $(data),--data $(call quoted,$(data))) --out $(@D)
	@printf '%s\n' $(call quoted,$(data)) > $(out)/data.path
gone = Error: $(data), which $(out)/data.path names as DATA of the last time, is not there any more. Give another \
  DATA=PATH, or DATA= to read what the recipe names from the hub
$(call done,prepare-data): override export MOUNT := $(MOUNT) $(data)

$(call done,sft): stages/sft.py $(call done,$(base) prepare-data)
	$(call stage,sft) $(call given,$(base) prepare-data) --out $(@D)

# Its verdict stands in the finished artifact, and it fails again each time it is asked, by name, while that is a bad
# one. grpo reads the verdict itself.
$(call done,score-base): stages/score_base.py $(call done,$(base) prepare-data sft) \
    $(if $(filter score-base,$(MAKECMDGOALS)),FORCE)
	$(call stage,score-base) $(call given,$(base) prepare-data sft) --out $(@D)

scored := $(if $(subset),score-base)
$(call done,grpo): stages/grpo.py $(call done,$(base) prepare-data sft $(scored)) $(out)/subset
	@$(if $(subset),$(if $(SUBSET),,echo 'SUBSET=1, as the last time; SUBSET= takes all problems' >&2))
	$(call stage,grpo) $(call given,$(base) prepare-data sft $(scored)) --out $(@D)

# SUBSET is kept before grpo begins: a run that was killed goes on with it.
ifneq ($(subset),$(file < $(out)/subset))
  $(out)/subset: FORCE
endif
$(out)/subset:
	@mkdir -p $(@D)
	@echo $(subset) > $@

$(call done,infer): stages/infer.py $(call done,$(base) prepare-data sft grpo)
	$(call stage,infer) $(call given,$(base) prepare-data sft grpo) --out $(@D)

$(call done,merge): stages/merge.py $(call done,$(base) prepare-data grpo)
	$(call stage,merge) $(call given,$(base) prepare-data grpo) --out $(@D)

$(call done,gguf): stages/gguf.py $(call done,$(base) prepare-data grpo merge)
	$(call stage,gguf) $(call given,$(base) prepare-data grpo merge) --out $(@D)

$(call done,ollama-modelfile): stages/ollama_modelfile.py $(call done,merge gguf)
	$(call stage,ollama-modelfile) $(call given,merge gguf) --out $(@D)

$(call done,$(changed)): FORCE

# Every stage is looked at again when the recipe or shared code changes; set-up only has to have been.
$(call done,$(stages)): $(recipe) $(lib) | $(ready)

# ---- with the result ----------------------------------------------------------------------------------------------

ask: $(call done,ollama-modelfile)  ## Ask the finished GGUF: make ask Q="What is 17 + 25?"
	@$(call stage,ask) $(call given,ollama-modelfile) --question "$$QUESTION"
ask: export QUESTION = $(value Q)
unexport Q  # or make would expand a $ in it

chat: $(call done,ollama-modelfile)  ## Talk with the finished GGUF
	@INTERACTIVE=1 $(call stage,chat) $(call given,ollama-modelfile)

# In a container the server has to listen to more than itself: docker/run publishes the port to this machine alone.
serve: $(call done,ollama-modelfile)  ## Serve the finished GGUF with OpenAI's API, to this machine alone (PORT=8000)
	@PUBLISH=$(PORT) $(call stage,serve) $(call given,ollama-modelfile) --port $(PORT) \
	  $(if $(filter docker,$(RUNTIME)),--host 0.0.0.0)

uploaded := prepare-data sft grpo infer merge gguf ollama-modelfile
push: $(call done,$(uploaded))  ## Upload the result to a private repository: make push HUB=user/name (PUBLIC=1, WHAT=gguf)
	@INTERACTIVE=1 $(call stage,push) --hub $(HUB) $(call given,$(uploaded)) \
	  $(if $(WHAT),--what $(WHAT)) $(if $(filter 1,$(PUBLIC)),--public) $(if $(filter 1,$(YES)),--yes)

ollama: $(call done,ollama-modelfile)  ## Hand the model to the machine's Ollama and ask it one question
	@$(on_host) -m stages.ollama --recipe $(recipe) $(call given,ollama-modelfile)

# ---- housekeeping -------------------------------------------------------------------------------------------------

setup: $(VENV)/installed  ## Make the virtual environment (the other targets do it when it is missing; GO=)

$(VENV)/installed: docker/install docker/llama docker/common docker/cpu.lock docker/cpu-cuda.lock \
    docker/dev.lock $(wildcard docker/gotemplate/*)
	docker/install $(VENV)

# The image is the environment and nothing else; its id stands in a file, and in the manifests.
define build
	mkdir -p data/cache
	DOCKER_BUILDKIT=1 $(DOCKER) build --target $(IMAGE) --tag temper:$(IMAGE) --iidfile data/cache/image-$(IMAGE).new \
	  $(if $(BASE),--build-arg BASE=$(BASE)) $(if $(TORCH_INDEX),--build-arg TORCH_INDEX=$(TORCH_INDEX)) \
	  $(if $(CA_BUNDLE),--secret id=ca_bundle$(comma)src=$(CA_BUNDLE)) \
	  $(if $(PIP_CONFIG),--secret id=pip_config$(comma)src=$(PIP_CONFIG)) $(BUILD_FLAGS) docker
	mv data/cache/image-$(IMAGE).new data/cache/image-$(IMAGE)
endef
image:  ## Build the container image (IMAGE=cpu or cuda, BASE=, CA_BUNDLE=, PIP_CONFIG=, BUILD_FLAGS=)
	$(build)

ifeq ($(RUNTIME),docker)
$(ready): docker/Dockerfile docker/apt docker/check.py docker/common docker/install docker/llama docker/$(IMAGE).lock \
    $(wildcard docker/gotemplate/*)
	$(build)
endif

shell: $(ready)  ## Open a shell where the stages run
	@$(if $(filter docker,$(RUNTIME)),INTERACTIVE=1 docker/run bash,PATH="$(CURDIR)/$(VENV)/bin:$$PATH" bash)

sbom: $(ready)  ## List every package with version, hash and licence: artifacts/sbom.json (CycloneDX)
	@mkdir -p artifacts
	$(python) docker/sbom.py > artifacts/sbom.json.new
	@mv artifacts/sbom.json.new artifacts/sbom.json

lock:  ## Resolve docker/*.in into the locks again (UV=uv; UPGRADE=1 takes newer versions)
	docker/lock

doctor:  ## Look, before a paid run, for whatever would make it fail
	@$(on_host) -m stages.doctor --recipe $(recipe)
doctor: export RUNTIME := $(RUNTIME)
doctor: export GPUS := $(GPUS)
doctor: export DATA := $(DATA)

check: $(VENV)/installed  ## Look at style and types, and run the tests that need no torch: 20 seconds
	$(VENV)/bin/python -m ruff check . && $(VENV)/bin/python -m ruff format --check . && $(VENV)/bin/python -m mypy && \
	  $(VENV)/bin/python -m pytest -m "not torch and not slow" --numprocesses auto --quiet

test: $(VENV)/installed  ## Run the tests, on the machine itself, in parallel
	$(VENV)/bin/python -m pytest --numprocesses auto --maxprocesses 8 --dist loadfile --durations 30 $(TESTS)

test-gpu: $(ready)  ## Run the tests that need an NVIDIA GPU, where the stages run (log: artifacts/test-gpu.log)
	@mkdir -p artifacts
	$(python) -m pytest -p no:cacheprovider --basetemp artifacts/.test-gpu tests/gpu 2>&1 | tee artifacts/test-gpu.log

clean:  ## Delete this recipe's artifacts (downloads and the virtual environment stay)
	rm -rf $(out)

help:  ## Show this
	@echo "make TARGET [RECIPE=$(RECIPE)] [RUNTIME=docker|local] [GPUS=all|0,1|none] [DATA=path] [TORCH_INDEX=address]"; echo
	@awk -F ':.*##' '/^[a-z-]+:.*##/ { printf "  %-18s%s\n", $$1, $$2 }' Makefile; echo
	@echo "Recipes:"; for each in $(recipes); do printf '  %-18s %s\n' "$$each" "$$(sed -n '1s/^# *//p' "recipes/$$each.toml")"; done
