# SPDX-License-Identifier: Apache-2.0
# Copyright The containerd-cloudhv Authors
#
# `make help` explains the targets. Each does what it needs done before, and does nothing twice.

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
.NOTPARALLEL:

# Our own tools first; then the system's, with sbin, where mkfs, runc and iptables live.
export PATH := $(CURDIR)/build/bin:$(CURDIR)/build/host/bin:$(PATH):/usr/local/go/bin:/usr/local/sbin:/usr/sbin:/sbin

# Where compilers find what set-up has unpacked and not installed. Each shell reads it, if it is there.
export BASH_ENV := $(CURDIR)/build/host/env

# One set of flags for all that is compiled, so that binaries and tests share one build cache. With
# these tags nothing links to libc but what cannot do without, and that does so statically.
export GOFLAGS ?= -buildvcs=false -trimpath -tags=netgo,osusergo,urfave_cli_no_docs
export CGO_ENABLED ?= 1

PKG ?= $$(go list ./... | grep -v /e2e)
RUN ?= .
FUZZTIME ?= 10s
FUZZALL ?= 1m
ROUNDS ?= 20
SECTIONS ?= start,concurrency,bare,io,density
PROCS ?= 4
SOAK_PODS ?= 1000
SOAK_MINUTES ?= 30
CHAOS_MINUTES ?= 30
STEP := source hack/lib.sh; step
AS_ROOT := -exec '$(CURDIR)/hack/as-root'
GOTEST := go test $(AS_ROOT) -run '$(RUN)' $(TESTFLAGS)
# As go test -v, and at the end what was skipped and what failed, once more.
GOTESTSUM := hack/gotestsum.sh $(AS_ROOT) $(TESTFLAGS) -count=1

# Each step says when it began, counted from here: in a log that tells where the time goes.
export STEPS_SINCE := $(shell date +%s)

##@ To look at it

.PHONY: help
help: ## Show this.
	@awk -f hack/help.awk $(MAKEFILE_LIST)

.PHONY: demo
demo: build ## Watch a pod come up in a virtual machine of its own (IMAGE=ref: another image).
	@go build -o build/bin/demo ./hack/demo
	@hack/as-root build/bin/demo

.PHONY: test
test: build lint unit fuzz-all e2e critest ## All checks: linters, unit and fuzz tests, end-to-end tests, the CRI validation suite, some tests on KVM. CI runs this.
	@SUBSET=ci VMM=qemu hack/node/test-kvm.sh --or-skip

##@ To work on it

.PHONY: setup
setup: ## Debian packages, guest kernel, crun and crictl (SKIP_SYSTEM=1: no packages).
	@hack/setup/go.sh
	@hack/setup/packages.sh install run build
	@hack/setup/guest.sh foreign
	@hack/setup/tools.sh crictl

.PHONY: setup-cloud-hypervisor
setup-cloud-hypervisor: ## The pinned release of Cloud Hypervisor into build/bin, where the network allows it. Nothing else needs it.
	@hack/setup/cloud-hypervisor.sh

.PHONY: build
build: setup ## Our binaries into build/bin and the guest image into build/guest (VERSION=...).
	@hack/build.sh
	@hack/setup/guest.sh image

.PHONY: lint
lint: ## gofmt, go vet, golangci-lint, shell scripts, kernel configurations, and that generated code is current.
	@hack/setup/packages.sh install generate lint || echo '    without what is missing'
	@hack/setup/tools.sh golangci-lint protoc-gen-go protoc-gen-go-ttrpc protoc-gen-go-grpc
	@hack/lint.sh

.PHONY: fix
fix: ## Format the code and let the linters mend what they can.
	@hack/setup/tools.sh golangci-lint
	golangci-lint fmt ./...
	golangci-lint run --fix ./...

.PHONY: unit
unit: build ## Tests of the packages, as root where they need it (PKG=./vmpool/... RUN=TestName TESTFLAGS=-v).
	@$(STEP) 'Unit tests'
	@hack/unit.sh $(PKG) -- $(GOTEST) -timeout 20m
	@go test -exec '$(CURDIR)/hack/as-root' -tags=failpoints,netgo,osusergo -run 'TestAt|TestEachPointFails' ./vmpool/failpoint ./vmpool ./controller

.PHONY: race
race: build ## The same under the race detector.
	@$(STEP) 'Unit tests with the race detector'
	@hack/unit.sh $(PKG) -- $(GOTEST) -race -timeout 30m

.PHONY: fuzz
fuzz: ## Each fuzz test for a while (FUZZTIME=10s, 5m, 2h).
	@hack/fuzz.sh each $(FUZZTIME)

.PHONY: fuzz-all
fuzz-all: ## All fuzz tests together in a minute (FUZZALL=1m), besides what compiling them takes. CI runs this.
	@hack/fuzz.sh all $(FUZZALL)

# For tests only, and never for a node: containerd and the shim with points at which they can be stopped.
.PHONY: failpoints
failpoints: build
	@hack/build.sh failpoints

.PHONY: faults
faults: failpoints ## The whole fault matrix: error, panic, hang and kill before each side effect, and misfortunes from outside (RUN='TestFaults/pods/start', CHAOS_SEED=n: in that order).
	@hack/setup/tools.sh gotestsum
	@$(STEP) 'Fault matrix'
	@E2E_REQUIRE=1 FAULTS=all $(GOTESTSUM) -run '$(if $(filter .,$(RUN)),^Test(Faults|Misfortunes)$$,$(RUN))' -timeout 120m ./e2e/faults

.PHONY: chaos
chaos: failpoints ## Faults at random on several pods at once (CHAOS_MINUTES=30, CHAOS_SEED=n to have the same again).
	@$(STEP) 'Chaos'
	@E2E_REQUIRE=1 CHAOS_MINUTES=$(CHAOS_MINUTES) CHAOS_SEED=$(CHAOS_SEED) go test $(AS_ROOT) -run '^TestChaos$$' $(TESTFLAGS) -v -count=1 -timeout $$(($(CHAOS_MINUTES) + 30))m ./e2e/faults

.PHONY: load
load: build ## A whole node's load, with runc and with ours: 100 pods at once, 500 commands, logs at full speed, 10,000 connections.
	@$(STEP) 'Load'
	@E2E_REQUIRE=1 E2E_COUNTS=load $(GOTEST) -run '^TestLoad$$' -v -count=1 -timeout 60m ./e2e

.PHONY: e2e
e2e: failpoints ## Tests through the CRI on a private containerd (RUN=TestName for some of them).
	@hack/previous.sh
	@hack/setup/tools.sh gotestsum
	@$(STEP) 'End-to-end tests'
	@E2E_REQUIRE=1 $(GOTESTSUM) -run '$(RUN)' -p 1 -timeout 60m ./e2e/...

.PHONY: test-kvm
test-kvm: failpoints ## The same in an emulated node with KVM, on QEMU, and on Cloud Hypervisor if it is here (RUN=TestName, SUITE=e2e|faults|driver, SUBSET=ci, VMM=qemu).
	@hack/previous.sh
	@SUITE='$(SUITE)' RUN='$(RUN)' SUBSET='$(SUBSET)' VMM='$(VMM)' hack/node/test-kvm.sh

# As it was typed: make would take its dollars for its own.
.PHONY: node
node: export NODE_COMMAND := $(value CMD)
node: ## A machine in software emulation whose KVM is real: a shell, or CMD='...' (NODE_MEMORY=MiB, NODE_CPUS=2, NODE_TIMEOUT=s; hack/node).
	@hack/node/setup.sh >&2
	@hack/node/run.sh $(if $(value CMD),"$$NODE_COMMAND")

.PHONY: bench
bench: build ## Compare with runc and the bare VMM; writes build/bench.json (ROUNDS=20 pods each, SECTIONS=start,concurrency,bare,io,density).
	@go build -o build/bin/bench ./e2e/bench
	@hack/as-root build/bin/bench -o build/bench.json -n $(ROUNDS) -sections $(SECTIONS)

# What is set on make's command line the script has in its environment; its defaults are smaller than ours.
.PHONY: bench-kvm
bench-kvm: build ## The same in the emulated node, on KVM; writes build/bench-kvm-VMM.json (ROUNDS=10, SECTIONS=start,bare, VMM=qemu).
	@hack/node/bench-kvm.sh

.PHONY: critest
critest: build ## The CRI validation suite by runc and by ours, compared (FOCUS=regexp, PROCS=4 specs at a time, REAL_IMAGES=1: not our own).
	@hack/setup/tools.sh critest ginkgo
	@[[ '$(REAL_IMAGES)' == 1 ]] || hack/setup/packages.sh files critest build/cache/critest
	@$(STEP) 'CRI validation suite'
	@mkdir -p build/critest && go build -o build/bin/critest-compare ./e2e/critest
	@hack/as-root build/bin/critest-compare -procs '$(PROCS)' -focus '$(FOCUS)' -real-images='$(if $(filter 1,$(REAL_IMAGES)),true,false)'

.PHONY: soak
soak: build ## Many pods for a long time; fails if one fails or anything grows (SOAK_PODS=1000 in a row, SOAK_MINUTES=30 of churn).
	@go build -o build/bin/soak ./e2e/soak
	@hack/as-root build/bin/soak -pods $(SOAK_PODS) -churn $(SOAK_MINUTES)m

.PHONY: generate
generate: ## Generate the protobuf code again.
	@hack/setup/packages.sh install generate
	@hack/setup/tools.sh protoc-gen-go protoc-gen-go-ttrpc protoc-gen-go-grpc
	@hack/generate.sh

##@ To get rid of it

.PHONY: clean
clean: ## Remove what was built, except for the caches of the guest kernel and crun.
	@hack/clean.sh outputs

.PHONY: distclean
distclean: ## Remove build/ altogether.
	@hack/clean.sh all

.PHONY: clean-system
clean-system: ## Undo what set-up did to this machine: remove the Debian packages it installed.
	@hack/setup/packages.sh remove
