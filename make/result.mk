# With the result of a run.

verify: | $(ready)  ## Hash every file of the recipe's artifacts, and compare it with what its stage wrote
	@$(call stage,verify) --artifacts $(out)

# Another machine lends its GPUs to node 0, which runs the stages. What node 0 hands over is kept for the next time.
node := data/cache/node/$(RECIPE)
node: | $(ready)  ## On another machine than node 0: train with it (NODE_RANK=1 MASTER=10.0.0.1:29400)
	$(call stage,node) --folder $(node)

ask: $(call done_of,ollama-modelfile)  ## Ask the finished GGUF: make ask Q="What is 17 + 25?"
	@$(call stage,ask) $(call given,ollama-modelfile) --question "$$QUESTION"
ask: export QUESTION = $(value Q)
unexport Q  # or make would expand a $ in it

chat: $(call done_of,ollama-modelfile)  ## Talk with the finished GGUF
	@INTERACTIVE=1 $(call stage,chat) $(call given,ollama-modelfile)

# In a container the server has to listen to more than itself: docker/run publishes the port to this machine alone.
serve: $(call done_of,ollama-modelfile)  ## Serve the finished GGUF with OpenAI's API, to this machine alone (PORT=8000)
	@PUBLISH=$(PORT) $(call stage,serve) $(call given,ollama-modelfile) --port $(PORT) \
	  $(if $(filter docker,$(RUNTIME)),--host 0.0.0.0)

uploaded := prepare-data sft grpo infer merge gguf ollama-modelfile
# Drawn from what there is, so also of a run that is under way: nothing is made for it but set-up.
report: | $(ready)  ## Draw the page of the run, report.html; also of one that is not finished (PRICE=2.5: cost by the hour)
	@$(call stage,report) --artifacts $(out) $(if $(PRICE),--price $(call quoted,$(PRICE)))

# Runs that are finished, held against each other.
compare: | $(ready)  ## Hold finished runs against each other: make compare RECIPES="one another" (PRICE=2.5)
	@$(python) -m stages.compare $(foreach each,$(RECIPES),--recipes recipes/$(each).toml) --runs artifacts \
	  $(if $(PRICE),--price $(call quoted,$(PRICE)))

sweep: | $(ready)  ## Run a recipe with other values, and compare: make sweep SET="grpo.learning_rate=1e-5,5e-5 grpo.seed=0,1"
	@names=$$($(on_host) -m stages.sweep --recipe $(recipe) --set "$$SET"); \
	  MAKE=$(call quoted,$(this_make)) GPUS=$(GPUS) make/sweep $(GOAL) $$names
sweep: export SET := $(value SET)
# make -n would run a line that names MAKE itself.
this_make := $(MAKE)

# Of the merged model, or of the GGUF in llama-server. What lies in BENCHMARKS is read, and nothing is then fetched.
judged := merge $(if $(filter gguf,$(OF)),gguf)
benchmark: $(call done_of,$(judged))  ## Run public benchmarks, base and result: make benchmark TASKS=gsm8k,math_hard LIMIT=200
	@$(call stage,benchmark) $(call given,$(judged) $(base)) --artifacts $(out) --of $(OF) --tasks $(call quoted,$(TASKS)) \
	  $(if $(LIMIT),--limit $(LIMIT)) $(if $(BENCHMARKS),--local $(call quoted,$(BENCHMARKS))) $(if $(filter 1,$(CHAT)),--chat)
benchmark: override export MOUNT := $(MOUNT)$(if $(BENCHMARKS),$(if $(MOUNT),:)$(BENCHMARKS))

push: $(call done_of,$(uploaded))  ## Upload the result to a private repository: make push HUB=user/name (PUBLIC=1, WHAT=gguf)
	@INTERACTIVE=1 $(call stage,push) --hub $(call quoted,$(HUB)) $(call given,$(uploaded)) \
	  $(if $(WHAT),--what $(call quoted,$(WHAT))) $(if $(filter 1,$(PUBLIC)),--public) $(if $(filter 1,$(YES)),--yes)

ollama: $(call done_of,ollama-modelfile)  ## Hand the model to the machine's Ollama and ask it one question
	@$(on_host) -m stages.ollama --recipe $(recipe) $(call given,ollama-modelfile)
