# Temper: post-train a small language model to reason, and hand back GGUF files and an Ollama Modelfile.
#
#   make all                               every stage, for the embedded tiny model
#   make all RECIPE=tiny-gsm8k DATA=...    the same for another recipe, from a local copy of its data
#   make all RUNTIME=local                 in a virtual environment, also where a container engine answers
#   make help                              targets, variables and recipes
#
# This file is the pipeline: the only place that knows the order of the stages. A stage is finished exactly when its
# folder in artifacts/<recipe>/ holds manifest.json, so that file is the target. Make decides by time whether to look at a
# stage; the stage then looks whether its recipe tables, inputs and code really changed, and if not is done in a moment.

ifneq ($(filter 1.% 2.% 3.% 4.0 4.0.% 4.1 4.1.%,$(MAKE_VERSION)),)
  $(error this is GNU make $(MAKE_VERSION); expected 4.2 or newer. On macOS: brew install make, then gmake instead of make)
endif
include make/variables.mk make/where.mk make/changed.mk

# ---- the graph: each stage, and whose finished folders it reads -----------------------------------------------------

all: infer ollama-modelfile  ## Run every stage whose inputs changed
	@$(call stage,verify) --artifacts $(out) --quick
	@$(call stage,report) --artifacts $(out)
	$(if $(filter-out 1,$(NODES)),@$(call stage,node) --folder $(node) --end)

base-model:        ## Make the embedded tiny base model (recipes with a [base_model] table)
base-model.reads       :=
prepare-data:      ## Turn problems into the sft, grpo and eval sets
prepare-data.reads     := $(base)
sft:               ## Fine-tune on worked solutions
sft.reads              := $(base) prepare-data
score-base:        ## Sample before GPU hours are spent: do the rewards tell completions apart?
score-base.reads       := $(base) prepare-data sft
grpo:              ## Improve with GRPO and verifiable rewards (SUBSET=1: on what score-base chose)
grpo.reads             := $(base) prepare-data sft $(scored)
infer:             ## Examine base, SFT and GRPO model on held-out problems
infer.reads            := $(base) prepare-data sft grpo
merge:             ## Fold the adapter into 16-bit safetensors, and prove it
merge.reads            := $(base) prepare-data grpo
gguf:              ## Make the GGUF files, and prove them
gguf.reads             := $(base) prepare-data grpo merge
ollama-modelfile:  ## Write the Ollama Modelfile, and prove it
ollama-modelfile.reads := merge gguf

$(stages): %: $(out)/%/manifest.json

$(done): $(out)/%/manifest.json: | $(ready)
	@$($*.before)
	$(call stage,$*) $(call given,$($*.reads)) $($*.more) --out $(@D)
	@$($*.after)

$(foreach each,$(stages),$(eval $(call done_of,$(each)): $(call done_of,$($(each).reads))))

include make/result.mk make/housekeeping.mk
