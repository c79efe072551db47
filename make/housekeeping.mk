# The virtual environment, the image, the tests, and what looks after them.

setup: $(VENV)/installed  ## Make the virtual environment (the other targets do it when it is missing; GO=)

# By content: docker/install does nothing when an environment was made of these very files.
set_up := $(addprefix docker/,install llama common gotemplate cpu.lock cpu-cuda.lock dev.lock)
$(VENV)/installed: $(if $(call newer,$(VENV)/installed,$(set_up)),FORCE)
	@docker/install $(VENV)

# The image is the environment and nothing else; its id stands in a file, and in the manifests.
image_file = data/cache/image-$(IMAGE)
define build
	@mkdir -p data/cache; touch $(image_file).began
	DOCKER_BUILDKIT=1 $(DOCKER) build --target $(IMAGE) --tag temper:$(IMAGE) --iidfile $(image_file).new \
	  $(if $(BASE),--build-arg $(call quoted,BASE=$(BASE))) \
	  $(if $(TORCH_INDEX),--build-arg $(call quoted,TORCH_INDEX=$(TORCH_INDEX))) \
	  $(if $(CA_BUNDLE),--secret $(call quoted,id=ca_bundle$(comma)src=$(CA_BUNDLE))) \
	  $(if $(PIP_CONFIG),--secret $(call quoted,id=pip_config$(comma)src=$(PIP_CONFIG))) $(BUILD_FLAGS) docker
	@touch -r $(image_file).began $(image_file).new; rm $(image_file).began; mv $(image_file).new $(image_file)
endef
image:  ## Build the container image (IMAGE=cpu or cuda, BASE=, CA_BUNDLE=, PIP_CONFIG=, BUILD_FLAGS=)
	$(build)

# What docker/Dockerfile reads: llama.cpp is compiled for both images with the pins of cpu.lock.
image_of.cpu := cpu.lock cpu-cuda.lock
image_of.cuda := cpu.lock cuda.lock
image_files = $(addprefix docker/,Dockerfile apt check.py common gotemplate install llama $(image_of.$(IMAGE)))
ifeq ($(RUNTIME),docker)
$(ready): $(if $(call newer,$(ready),$(image_files)),FORCE)
	$(build)
endif

shell: $(ready)  ## Open a shell where the stages run
	@$(if $(filter docker,$(RUNTIME)),INTERACTIVE=1 docker/run bash,PATH="$$(realpath $(VENV)/bin):$$PATH" bash)

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

check: $(VENV)/installed  ## Look at style and types, and run the tests that need no torch: about a minute on two cores
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
	@make/help $(MAKEFILE_LIST)
