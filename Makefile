# Everything a person or CI does with this repository, in one word each. The work
# is done by cargo and by the scripts in resources/; this only puts it in order.

SHELL := bash
.SHELLFLAGS := -euo pipefail -c
# The targets share cargo's lock and the machine's cores: side by side they would
# only be slower and harder to read. `make test` overlaps by itself what gains by it.
.NOTPARALLEL:
.DEFAULT_GOAL := help

# Survives `make clean`: what is in it takes long to make, and is keyed by content.
CACHE := $(or $(PERENNIAL_CACHE),$(or $(XDG_CACHE_HOME),$(HOME)/.cache)/perennial)

# A cargo-deny that `make deny` has installed is found like one that was there before.
CARGO_DENY_VERSION := 0.20.2
export PATH := $(PATH):$(CACHE)/tools/bin

# How long each test of the last `make test` took that ran on a machine: seconds and name.
TIMES := target/test-times
# What making the kernels said during the last `make test`.
KERNELS_LOG := target/kernels.log

# The suite that `make suites` runs: all, or those whose names have this in them.
SUITE :=

# What carries the VMs of the demo: `pool` under Debian's kernels as they are, or
# `kernel` under kernels with the Live Update Orchestrator, which are built first.
LUO := pool

# How the end-to-end suites, the demo and the benchmark find their kernels. The
# targets `kernels` and `stock` have got them by then, so this only looks them up.
WITH_STOCK = \
	PERENNIAL_KERNEL_STOCK_A="$$(resources/kernel/stock.sh stock-a)" \
	PERENNIAL_KERNEL_STOCK_B="$$(resources/kernel/stock.sh stock-b)"
WITH_KERNELS = \
	PERENNIAL_KERNEL_HOST_A="$$(resources/kernel/build.sh host-a)" \
	PERENNIAL_KERNEL_HOST_B="$$(resources/kernel/build.sh host-b)" \
	PERENNIAL_KERNEL_GUEST="$$(resources/kernel/build.sh guest)"

STEP = @echo "==>"

.PHONY: help
help: ## This list
	@echo "Perennial: virtual machines that outlive their host's kernel"
	@echo
	@sed -nE 's/^([a-z]+):.*## (.*)/  make \1\t\2/p' $(firstword $(MAKEFILE_LIST)) | expand -t 18

.PHONY: demo
demo: setup $(if $(filter kernel,$(LUO)),kernels,stock) ## A live update under two running VMs, to watch (LUO=pool|kernel)
	$(STEP) "demo (first run: some minutes to compile)"
	@$(if $(filter kernel,$(LUO)),$(WITH_KERNELS),$(WITH_STOCK)) \
		cargo run --release -p perennial-tests --bin demo -- $(LUO)

.PHONY: check
check: ## Formatting, clippy, unit tests and documentation: for every edit
	$(STEP) "formatting"
	@cargo fmt --all --check
	$(STEP) "clippy (first run: a minute)"
	@cargo clippy --quiet --workspace --all-targets -- -D warnings
	$(STEP) "unit tests (first run: two minutes to compile)"
	@cargo test --quiet --workspace --lib --bins
	$(STEP) "documentation (first run: half a minute)"
	@RUSTDOCFLAGS="-D warnings" cargo doc --quiet --workspace --no-deps --document-private-items

# Kernels are built and fetched while the code is checked and compiled: each leaves cores
# idle at times, and waits for the network at others. The machines of the tests come after
# both, because they need the cores to themselves.
.PHONY: test
test: setup ## All checks and all tests, as CI runs them
	@mkdir -p target
	@rm -f $(TIMES)
	$(STEP) "kernels, meanwhile (first run: 10 to 20 minutes on 2 cores; the log is $(KERNELS_LOG))"
	@$(MAKE) --no-print-directory kernels stock systemd >$(KERNELS_LOG) 2>&1 & kernels=$$!; \
	trap 'kill $$kernels 2>/dev/null || true' EXIT; \
	$(MAKE) --no-print-directory lint; \
	echo "==> compiling the tests (first run: some minutes)"; \
	cargo test --quiet --workspace --no-run; \
	echo "==> waiting for the kernels"; \
	wait $$kernels || { cat $(KERNELS_LOG); exit 1; }; \
	trap - EXIT; \
	cat $(KERNELS_LOG)
	$(STEP) "tests, end-to-end suites included"
	@status=0; \
	$(WITH_KERNELS) $(WITH_STOCK) PERENNIAL_TIMES="$(abspath $(TIMES))" \
		cargo test --workspace --no-fail-fast || status=$$?; \
	echo "==> seconds of the slowest tests that ran on machines"; \
	if [[ -e $(TIMES) ]]; then sort -rn $(TIMES) | sed -n '1,10p'; fi; \
	exit $$status

.PHONY: suites
suites: setup kernels stock systemd ## The end-to-end suites alone; SUITE=name for one of them
	$(STEP) "end-to-end suites $(SUITE) (first run: some minutes to compile)"
	@$(WITH_KERNELS) $(WITH_STOCK) cargo test -p perennial-tests --test suites -- $(SUITE)

.PHONY: bench
bench: setup kernels ## Measure the blackout and the built-in LUO
	$(STEP) "benchmark (first run: some minutes to compile)"
	@$(WITH_KERNELS) cargo run --release -p perennial-tests --bin bench

.PHONY: fuzz
fuzz: ## Fuzz every parser and device for a minute each
	$(STEP) "fuzzing (PERENNIAL_FUZZ_SECONDS for each target; first run: some minutes to compile)"
	@resources/fuzz.sh

.PHONY: lint
lint: ## Formatting, clippy, documentation, and cargo-deny where it is installed
	$(STEP) "formatting"
	@cargo fmt --all --check
	$(STEP) "clippy (first run: a minute or two)"
	@cargo clippy --workspace --all-targets -- -D warnings
# What an image is built without is not in the way of what it is built with.
	@cargo clippy --package vmm --no-default-features -- -D warnings
	$(STEP) "documentation (first run: a minute)"
	@RUSTDOCFLAGS="-D warnings" cargo doc --workspace --no-deps --document-private-items
# A unit test (tests/src/dependencies.rs) checks licences, bans and sources on every machine.
	$(STEP) "dependencies"
	@if command -v cargo-deny >/dev/null; then \
		$(MAKE) --no-print-directory deny; \
	else \
		echo "SKIPPED: cargo-deny is not installed, so advisories are not looked at (\`make deny\`" \
			"installs it); licences, bans and sources are checked by the unit tests"; \
	fi

.PHONY: deny
deny: ## Dependencies by cargo-deny: licences, bans, sources and advisories
	@if ! command -v cargo-deny >/dev/null; then \
		echo "==> installing cargo-deny $(CARGO_DENY_VERSION) into $(CACHE)/tools (once; 5 to 10 minutes)"; \
		cargo install --quiet --locked --root "$(CACHE)/tools" cargo-deny@$(CARGO_DENY_VERSION); \
	fi
	$(STEP) "dependencies: licences, bans, sources"
	@cargo deny check licenses bans sources
# The advisories are not in the registry but in a git repository, which some networks
# do not let through. Not being able to ask is not an answer, so it is said.
	$(STEP) "dependencies: advisories"
	@if timeout 20 git ls-remote --quiet --exit-code https://github.com/RustSec/advisory-db HEAD >/dev/null 2>&1; then \
		cargo deny check advisories; \
	else \
		echo "SKIPPED: the advisory database cannot be reached from here"; \
	fi

.PHONY: kernels
kernels: ## Build the test kernels, or find them in the cache
	$(STEP) "kernels (first run: about 10 minutes on 2 cores)"
	@resources/kernel/build.sh all

.PHONY: stock
stock: ## Fetch Debian's kernels, or find them in the cache
	$(STEP) "stock kernels (first run: some seconds, 80 MB)"
	@resources/kernel/stock.sh all

.PHONY: systemd
systemd: ## Fetch the systemd of the tests, or find it in the cache
	$(STEP) "systemd (first run: half a minute, 15 MB)"
	@resources/systemd/image.sh

.PHONY: setup
setup: ## Install what is missing to build and test (Debian 12 or 13)
	$(STEP) "what this machine needs (first run: a minute)"
	@resources/setup.sh

.PHONY: clean
clean: ## Remove build products; kernels and tools stay in the cache
	cargo clean
	@echo "kept: $(CACHE)"
