# Where a stage runs: in a container if an engine answers, with the GPUs if it can hand them over; else in the virtual
# environment. Targets that start no stage do not ask.

# Training takes a process a GPU where GPUS names several.
export TEMPER_GPUS := $(GPUS)
export PROCESSES NODES NODE_RANK MASTER

goals := $(or $(MAKECMDGOALS),help)
ifneq ($(filter-out help clean setup check test lock doctor,$(goals)),)
  ifeq ($(RUNTIME),)
    override RUNTIME := $(if $(shell timeout 10 $(DOCKER) info > /dev/null 2>&1 && echo yes),docker,local)
    chosen := yes
  endif
  ifneq ($(filter docker,$(RUNTIME))$(filter image,$(goals)),)
    ifeq ($(GPUS),)
      nvidia := $(shell { $(DOCKER) info --format '{{json .Runtimes}}' | grep nvidia || \
          command -v nvidia-container-runtime-hook || ls /etc/cdi /var/run/cdi | grep nvidia; } 2> /dev/null)
      override GPUS := $(if $(nvidia),all,none)
    endif
    ifeq ($(IMAGE),)
      override IMAGE := $(if $(filter none,$(GPUS)),cpu,cuda)
    endif
  endif
  ifdef chosen  # on standard error: standard output is for what a stage says
    chosen := $(if $(filter docker,$(RUNTIME)),$(DOCKER) answers; image $(IMAGE)$(comma) GPUS=$(GPUS),no container \
      engine answers ($(DOCKER)); $(VENV))
    said := $(shell echo RUNTIME=$(RUNTIME): $(call quoted,$(chosen)) >&2)
  endif
endif

# A mirror of the hub holds no Xet storage: with it, files would come from the hub's own storage, past the mirror.
ifneq ($(HF_ENDPOINT),)
  export HF_HUB_DISABLE_XET ?= 1
endif

# `docker/run` mounts what MOUNT, DATA and the recipe name; the virtual environment sees this machine anyway.
ifeq ($(RUNTIME),docker)
  ready := data/cache/image-$(IMAGE)
  python = docker/run python
  export IMAGE_FILE := $(ready)
  export RECIPE_FILE := $(recipe)
  export GPUS CA_BUNDLE MOUNT MEMORY PIDS
else
  export HF_HUB_DISABLE_TELEMETRY ?= 1
  ready := $(VENV)/installed
  python := $(VENV)/bin/python
  ifneq ($(filter-out all,$(GPUS)),)
    export CUDA_VISIBLE_DEVICES := $(filter-out none,$(GPUS))
  endif
endif

# $(call stage,name): run a stage on this recipe. $(call given,names): the folders of its inputs.
stage = $(python) -m stages.$(subst -,_,$(1)) --recipe $(recipe)
given = $(foreach name,$(1),--$(name) $(out)/$(name))
# For what looks at the machine itself, before anything is installed or built if need be: it asks for no more than click.
on_host = $(call quoted,$(or $(shell for each in $(VENV)/bin/python $(call quoted,$(PYTHON)); do \
  "$$each" -c 'import click, tomllib' 2> /dev/null && { printf %s "$$each"; break; }; done; true),$(error \
  $(PYTHON) has no click. Run: $(PYTHON) -m pip install click, or: make setup)))

# Only a recipe with a [base_model] table makes its own base model; every stage that loads the model then reads it.
ifneq ($(filter all verify ask chat serve push ollama benchmark $(stages) $(out)/%,$(goals)),)
  told := $(shell for each in $(call quoted,$(PYTHON)) $(VENV)/bin/python; do \
    "$$each" make/recipe.py base-model $(recipe) 2> /dev/null && break; done; true)
  ifeq ($(told)$(RUNTIME),docker)  # no Python here reads TOML; the image's does
    ifneq ($(wildcard $(ready)),)
      told := $(shell RECIPE_FILE= IMAGE_FILE=$(ready) DOCKER=$(call quoted,$(DOCKER)) GPUS=none MOUNT= DATA= CA_BUNDLE= \
        docker/run python make/recipe.py base-model $(recipe))
    else ifeq ($(findstring n,$(filter-out --%,$(firstword $(MAKEFLAGS)))),)  # make builds what it includes, and begins again
      include $(ready).mk
$(ready).mk: $(ready)
	@touch $@
      told := later
    else
      told := no
    endif
  endif
  ifeq ($(told),)
    $(error $(PYTHON) can't read a recipe: expected Python 3.11 or newer. Run: make PYTHON=python3.12 ...)
  endif
  base := $(if $(filter yes,$(told)),base-model)
endif
