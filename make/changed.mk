# When a finished stage is looked at again: an input's manifest is newer than its own (the graph), or what else it goes by
# changed since its manifest's time, which is when the stage began (make/changed).

changed := $(shell make/changed $(RECIPE))

# Where DATA points is kept when prepare-data has succeeded with it: a wrong one is forgotten. It is written down before as
# well, as a kill may come between the stage's end, when its manifest is the newer of the two, and the keeping.
left := $(shell cd $(out) 2> /dev/null && test -e data.path.began && test prepare-data/manifest.json -nt data.path.began && \
  mv data.path.began data.path && rm -f data.path.new)

# $(call kept,NAME,file): what NAME is, or if it was not given, what it was the last time; NAME= forgets that.
kept = $(or $($(1)),$(if $(filter command,$(origin $(1))),,$(file < $(out)/$(2))))
data := $(call kept,DATA,data.path)
subset := $(call kept,SUBSET,subset)
scored := $(if $(subset),score-base)

ifneq ($(data),$(file < $(out)/data.path))
  changed += prepare-data
endif
prepare-data.before = $(if $(data),test -e $(call quoted,$(data)) || { echo $(call quoted,$(gone)) >&2; exit 1; };) \
  mkdir -p $(out) && $(call note,data.path.began)
prepare-data.more = $(if $(data),--data $(call quoted,$(data)))
prepare-data.after = $(call note,data.path) && rm -f $(out)/data.path.began
note = printf '%s\n' $(call quoted,$(data)) > $(out)/data.path.new && sync $(out)/data.path.new && \
  mv $(out)/data.path.new $(out)/$(1)
gone = Error: $(data), which $(out)/data.path names as DATA of the last time, is not there any more. Give another \
  DATA=PATH, or DATA= to read what the recipe names from the hub
$(call done_of,prepare-data): override export DATA := $(data)

# SUBSET is kept before grpo begins: a run that was killed goes on with it.
grpo.before = $(if $(subset),$(if $(SUBSET),,echo 'SUBSET=1, as the last time; SUBSET= takes all problems' >&2))
$(call done_of,grpo): $(out)/subset
ifneq ($(subset),$(file < $(out)/subset))
  $(out)/subset: FORCE
endif
$(out)/subset:
	@mkdir -p $(@D)
	@echo $(subset) > $@.new && sync $@.new && mv $@.new $@

# score-base fails again each time it is asked, by name, while its verdict is a bad one. grpo reads the verdict itself.
$(call done_of,$(changed) $(filter score-base,$(goals))): FORCE

# $(call newer,file,files): something, if one of `files` changed since `file` was made, or `file` is not there.
newer = $(shell find $(2) -newercm $(1) -print -quit 2>&1)
