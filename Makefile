# One target for each task of a person or of CI. cargo and the scripts in resources/
# do the work; the Makefile calls them in the right order.

SHELL := bash
.SHELLFLAGS := -euo pipefail -c
# The targets share cargo's lock and the computer's cores, so running them in parallel
# would only be slower and harder to read. `make test` overlaps the steps that gain by it.
.NOTPARALLEL:
.DEFAULT_GOAL := help

# The cache survives `make clean`: its contents take long to make. A hash of the inputs
# is in their names, so they cannot be out of date.
CACHE := $(or $(PERENNIAL_CACHE),$(or $(XDG_CACHE_HOME),$(HOME)/.cache)/perennial)

# The path lets this Makefile find a cargo-deny that `make deny` has installed.
CARGO_DENY_VERSION := 0.20.2
export PATH := $(PATH):$(CACHE)/tools/bin

# Seconds and name of each test of the last `make test` that ran on a machine in QEMU.
TIMES := target/test-times
# The output of the kernel builds and downloads during the last `make test`.
KERNELS_LOG := target/kernels.log

# `make suites` runs the tests whose names contain this: all if it is empty.
SUITE :=

# The LUO that carries the demo's VMs: `pool`, under Debian's unchanged kernels, or
# `kernel`, under kernels with the Live Update Orchestrator, which are built first.
LUO := pool

# Environment variables that tell the end-to-end suites, the demo and the benchmark
# where their kernels are. The targets `kernels` and `stock` run before, so the scripts
# only find the kernels in the cache here.
WITH_STOCK = \
	PERENNIAL_KERNEL_STOCK_A="$$(resources/kernel/stock.sh stock-a)" \
	PERENNIAL_KERNEL_STOCK_B="$$(resources/kernel/stock.sh stock-b)"
WITH_KERNELS = \
	PERENNIAL_KERNEL_HOST_A="$$(resources/kernel/build.sh host-a)" \
	PERENNIAL_KERNEL_HOST_B="$$(resources/kernel/build.sh host-b)" \
	PERENNIAL_KERNEL_GUEST="$$(resources/kernel/build.sh guest)"

# What `make bench` measures: `luo`, `blackout`, `machine`, or everything if it is empty. `make bench machine` works
# as well, because the second word is then a target that does nothing.
BENCH := $(filter luo blackout machine,$(MAKECMDGOALS))

STEP = @echo "==>"

.PHONY: help
help: ## This list
	@echo "Perennial: virtual machines that outlive their host's kernel"
	@echo
	@sed -nE 's/^([a-z-]+):.*## (.*)/  make \1\t\2/p' $(firstword $(MAKEFILE_LIST)) | expand -t 18

.PHONY: demo
demo: setup $(if $(filter kernel,$(LUO)),kernels,stock) ## Show a live update under two running VMs (LUO=pool|kernel)
	$(STEP) "demo (first run: some minutes to compile)"
	@$(if $(filter kernel,$(LUO)),$(WITH_KERNELS),$(WITH_STOCK)) \
		cargo run --release -p perennial-tests --bin demo -- $(LUO)

.PHONY: check
check: ## Formatting, clippy, unit tests and documentation: after every edit
	$(STEP) "formatting"
	@cargo fmt --all --check
	$(STEP) "clippy (first run: a minute)"
	@cargo clippy --quiet --workspace --all-targets -- -D warnings
	$(STEP) "unit tests (first run: two minutes to compile)"
	@cargo test --quiet --workspace --lib --bins
	$(STEP) "documentation (first run: half a minute)"
	@RUSTDOCFLAGS="-D warnings" cargo doc --quiet --workspace --no-deps --document-private-items

# Kernels are built and fetched while the code is checked and compiled, because each of
# the two at times leaves cores idle or waits for the network. The tests run after both,
# because their machines need all cores.
.PHONY: test
test: setup ## All checks and all tests, as CI runs them
	@mkdir -p target
	@rm -f $(TIMES)
	$(STEP) "kernels, in the background (first run: 10 to 20 minutes on 2 cores; log: $(KERNELS_LOG))"
	@$(MAKE) --no-print-directory kernels stock systemd debian versions >$(KERNELS_LOG) 2>&1 & kernels=$$!; \
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
suites: setup kernels stock systemd debian versions ## Only the end-to-end suites; SUITE=name for one of them
	$(STEP) "end-to-end suites $(SUITE) (first run: some minutes to compile)"
	@$(WITH_KERNELS) $(WITH_STOCK) cargo test -p perennial-tests --test suites -- $(SUITE)

.PHONY: test-guests
test-guests: setup kernels stock debian debian-13 versions ## Debian guests at work and big guests, which CI has no time for
	$(STEP) "end-to-end suites debian and guests (half an hour)"
	@export PERENNIAL_GUESTS=1 $(WITH_KERNELS) $(WITH_STOCK); \
		cargo test -p perennial-tests --test suites -- debian::; \
		cargo test -p perennial-tests --test suites -- guests::

# Number of live updates of `make soak`.
N := 100

.PHONY: soak
soak: setup kernels stock ## N live updates in a row under four VMs at work, on each LUO (N=100)
	$(STEP) "$(N) live updates on each LUO (half a minute each on an emulated host)"
	@$(WITH_KERNELS) $(WITH_STOCK) PERENNIAL_SOAK=$(N) \
		cargo test -p perennial-tests --test suites -- soak:: --nocapture

.PHONY: faults
faults: setup ## Every fault at every step of a handover, and what becomes of the guests (WRITE=1 writes the tables)
	$(STEP) "docs/faults.md (three minutes)"
	@export PERENNIAL_FAULTS=all $(if $(WRITE),PERENNIAL_WRITE_TABLE=1); \
		cargo test -p vmm --test daemon -- faults:: --nocapture

.PHONY: machine-faults
machine-faults: setup kernels stock ## Faults at every step of a live update in a machine, on each LUO (WRITE=1 writes the tables)
	$(STEP) "live updates with faults on each LUO (half an hour on an emulated host)"
	@export PERENNIAL_MACHINE_FAULTS=all $(if $(WRITE),PERENNIAL_WRITE_TABLE=1) $(WITH_KERNELS) $(WITH_STOCK); \
		cargo test -p perennial-tests --test suites -- faults:: --nocapture

.PHONY: conformance
conformance: setup kernels stock ## The whole conformance table, on every LUO
	$(STEP) "conformance (first run: some minutes to compile)"
	@$(WITH_KERNELS) $(WITH_STOCK) cargo test -p perennial-tests --test conformance

.PHONY: bench
bench: setup kernels $(if $(filter luo blackout,$(BENCH)),,qemu) ## Measure; `make bench machine` (or luo, blackout) for one part
	$(STEP) "benchmark $(BENCH) (first run: some minutes to compile)"
	@$(WITH_KERNELS) cargo run --release -p perennial-tests --bin bench -- $(BENCH)

.PHONY: luo blackout machine
luo blackout machine: $(if $(filter bench,$(MAKECMDGOALS)),,bench)
	@:

.PHONY: fuzz
fuzz: ## Fuzz every parser and device for a minute each
	$(STEP) "fuzzing (PERENNIAL_FUZZ_SECONDS for each target; first run: some minutes to compile)"
	@resources/fuzz.sh

.PHONY: lint
lint: ## Formatting, clippy, documentation, and cargo-deny if it is installed
	$(STEP) "formatting"
	@cargo fmt --all --check
	$(STEP) "clippy (first run: a minute or two)"
	@cargo clippy --workspace --all-targets -- -D warnings
# The `perennial` in images is built without default features, so that is checked too.
	@cargo clippy --package vmm --no-default-features -- -D warnings
	$(STEP) "documentation (first run: a minute)"
	@RUSTDOCFLAGS="-D warnings" cargo doc --workspace --no-deps --document-private-items
# A unit test (tests/src/dependencies.rs) checks licences, bans and sources without cargo-deny.
	$(STEP) "dependencies"
	@if command -v cargo-deny >/dev/null; then \
		$(MAKE) --no-print-directory deny; \
	else \
		echo "SKIPPED: cargo-deny is not installed, so advisories are not checked (\`make deny\`" \
		"installs it); the unit tests check licences, bans and sources"; \
	fi

.PHONY: deny
deny: ## Dependencies by cargo-deny: licences, bans, sources and advisories
	@if ! command -v cargo-deny >/dev/null; then \
		echo "==> installing cargo-deny $(CARGO_DENY_VERSION) into $(CACHE)/tools (once; 5 to 10 minutes)"; \
		cargo install --quiet --locked --root "$(CACHE)/tools" cargo-deny@$(CARGO_DENY_VERSION); \
	fi
	$(STEP) "dependencies: licences, bans, sources"
	@cargo deny check licenses bans sources
# The advisories are in a git repository, which some networks do not let through. In that
# case the check is reported as skipped, not as passed.
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

# Without an earlier commit, as in a shallow clone, the suite is skipped and says so; CI must not skip it.
.PHONY: versions
versions: ## Build the earlier programs that updates start from, or find them in the cache
	$(STEP) "earlier programs (first run: two to four minutes on 2 cores)"
	@resources/versions/build.sh all || { [[ $$? == 3 && -z "$${CI:-}" ]] && echo "SKIPPED: the suite versions"; }

.PHONY: qemu
qemu: ## Fetch the QEMU that is measured beside Perennial, or find it in the cache
	$(STEP) "Debian's QEMU (first run: half a minute, 40 MB)"
	@resources/qemu/image.sh

.PHONY: debian
debian: ## Make the Debian disk image of the tests, or find it in the cache
	$(STEP) "disk image of Debian 12 (first run: two to four minutes, 200 MB)"
	@resources/debian/image.sh

.PHONY: debian-13
debian-13: ## Make the disk image of Debian 13, or find it in the cache
	$(STEP) "disk image of Debian 13 (first run: two to four minutes, 200 MB)"
	@resources/debian/image.sh trixie

.PHONY: setup
setup: ## Install missing packages for building and testing (Debian 12 or 13)
	$(STEP) "packages for building and testing (first run: a minute)"
	@resources/setup.sh

.PHONY: clean
clean: ## Remove build products; kernels and tools stay in the cache
	cargo clean
	@echo "kept: $(CACHE)"
