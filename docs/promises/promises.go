// SPDX-License-Identifier: Apache-2.0
// Copyright The containerd-cloudhv Authors

// Package promises is the list of what the runtime promises when something fails, with the
// tests that try each. A part of docs/reliability.md is made from it. Its tests fail where a
// test that is named is not there, and where the document is not what the list says.
package promises

import (
	"fmt"
	"strings"
)

// Promise is something that holds, whatever fails.
type Promise struct {
	Text string
	// Tests try it: names of tests in e2e, or of others as DIRECTORY:NAME. Fuzz* are all of a
	// directory's.
	Tests []string
}

// Section is a part of the list.
type Section struct {
	Title    string
	Promises []Promise
}

func tests(names ...string) []string { return names }

// Sections are the whole list.
func Sections() []Section {
	return []Section{
		{"containerd is restarted, killed or replaced, and pods go on", []Promise{
			{"Output that flows reaches the log, each byte once and in order", tests("TestRestart", "TestLogToStoppedContainerd")},
			{"A container that ends meanwhile has its exit code, its reason, its time and its last words", tests("TestRestart")},
			{"One that the guest's kernel kills for its memory meanwhile is `OOMKilled`", tests("TestRestartOOM")},
			{"Ends that nobody has heard of are told again, in order", tests("controller/shim:TestContainerdAway", "controller:TestWhatHappenedWhileContainerdWasAway")},
			{"Clients of exec and attach are told, and connect again", tests("TestRestartSessions")},
			{"Connections of a port-forward go on, those of CRI's own streaming end, and new ones are made", tests("TestPortForwardRestart")},
			{"Volumes are written all the while; block devices and user namespaces are as before", tests("TestVolumesRestart", "TestBlockDeviceRestart", "TestUserNamespaceRestart")},
			{"Metrics count what lives and what was recovered", tests("TestObserve")},
			{"Processor time and memory of containers go on from where they were", tests("TestRestart")},
			{"A VM or a shim that dies meanwhile ends its own pod only", tests("TestRestartDied")},
			{"A start that it cuts short leaves nothing behind", tests("TestRestartDuringStart", "e2e/faults:TestFaults")},
			{"Another build takes over, and gives back, VMs, shims and records", tests("TestUpgrade")},
			{"The recovery of 100 pods takes at most 3 s more than runc's", tests("TestLoad", "controller:TestRecoverInParallel")},
			{"A pod's VM that does not answer at first is not given up", tests("controller:TestAVMThatDoesNotAnswerInTimeRunsOn", "controller:TestManyVMsThatDoNotAnswer")},
		}},
		{"Records", []Promise{
			{"A damaged, truncated, newer or foreign record costs its own pod only, is named and set aside", tests("controller:TestADamagedRecordCostsOnlyItsPod", "controller:FuzzRecord", "vmpool:FuzzRecord")},
			{"Writes of records survive power loss at any of their steps", tests("controller:TestEveryPrefixOfARecord", "controller:TestRecoveryFromAnOlderRecord")},
			{"After a boot of the host nothing old is taken for alive, and all of it is removed", tests("controller:TestRecoverAfterABoot", "controller:TestRecoverOnAFreshHost", "controller:TestAnotherProcessWithTheVMsPidIsLeftAlone")},
			{"Snapshots that are damaged, of another version or half written are made anew", tests("TestSnapshotFaults", "vmpool/snapshot:TestDamage", "vmpool/snapshot:TestKey", "vmpool/snapshot:FuzzManifest")},
		}},
		{"Faults at every step", []Promise{
			{"Error, panic, hang and kill before each side effect: the error tells what, a retry succeeds, nothing is left", tests("e2e/faults:TestFaults", "controller:TestEachPointFails", "vmpool:TestEachPointFails")},
			{"No side effect is without its point, and no point without a scenario", tests("vmpool/failpoint/points:TestEffects", "vmpool/failpoint/points:TestPoints", "e2e/faults:TestFaults")},
			{"The same at random, on several pods at once", tests("e2e/faults:TestChaos")},
			{"A VMM, a shim or containerd that stands still for 30 s goes on afterwards", tests("e2e/faults:TestMisfortunes")},
			{"Full disks, of the state and of the cache: errors that say so, and pods can be removed", tests("e2e/faults:TestMisfortunes", "TestTemplatesDiskFull", "controller:TestPodsCanBeRemovedFromAFullDisk", "TestOperations")},
			{"No file descriptors, in containerd, a shim or a VMM", tests("e2e/faults:TestMisfortunes")},
			{"containerd can make no further process", tests("e2e/faults:TestMisfortunes")},
			{"The kernel kills a VMM for its pod's memory", tests("e2e/faults:TestMisfortunes")},
			{"A container's want of memory is its own; the pool gives way to pods", tests("TestOOMIsTheGuests", "TestHostMemoryLow")},
			{"A network namespace that is deleted under a pod, a bridge that is removed", tests("e2e/faults:TestMisfortunes")},
			{"CNI's ADD or DEL fails", tests("TestNetworks")},
			{"The host's clock jumps: guests follow", tests("e2e/faults:TestMisfortunes", "controller:TestHostClock", "controller:TestGuestsFollowTheHostsClock", "TestClock")},
			{"Calls too early, twice, in another order, and those whose caller leaves", tests("TestOrder", "TestOrderMachineGone", "TestOrderCancelledStart", "TestOrderDuplicate", "TestOrderDuringStart", "TestOrderDuringCreation")},
			{"A VMM, a shim or a guest that dies or falls silent", tests("TestVMMKilled", "TestShimKilled", "TestSilent", "TestPoolFaults")},
		}},
		{"A hostile guest", []Promise{
			{"An agent that answers garbage, too much, too late, never, or a million times: its pod ends, the node and other pods do not notice", tests("TestHostileGuest")},
			{"Memory, disk and time that a guest can take on the host are bounded", tests("TestShimMemoryBounded", "TestHostileGuest", "controller/shim:TestEventsAreBounded", "controller/shim:TestHostileAnswers", "controller:TestAGuestThatBabbles")},
			{"Whatever faces the guest, or reads a file of ours, is fuzzed", tests("controller:Fuzz*", "controller/shim:Fuzz*", "controller/shim/ninep:Fuzz*", "controller/shim/guestspec:Fuzz*", "guest/api/transport:Fuzz*", "vmpool:Fuzz*", "vmpool/snapshot:Fuzz*", "vmpool/qemu:Fuzz*", "vmpool/cloudhypervisor:Fuzz*")},
			{"A VMM that was taken over reaches its own files only", tests("TestConfined", "vmpool/qemu:TestTakenOver", "vmpool/cloudhypervisor:TestTakenOver")},
			{"The volumes' server is confined to its volume", tests("controller/shim/ninep:TestConfined", "controller/shim/ninep:TestRenameRace")},
			{"Files and sockets have the modes that they should; nothing of ours listens on a network", tests("TestModes", "TestNothingListens")},
			{"A pod's secrets reach no log, metric, other pod's state or template", tests("TestSecrets")},
		}},
		{"Load", []Promise{
			{"100 pods at once, 500 commands in a minute, 50 logs at full speed, 10,000 connections: nothing fails, and others are answered", tests("TestLoad")},
			{"Many pods come and go, and nothing grows", tests("TestChurn", "TestExecsAtOnce", "TestPortForwardChurn")},
			{"What is read slowly is written slowly", tests("TestOutputToStallingReader", "TestLogToStoppedContainerd")},
		}},
	}
}

// Between these lines of the document stands the table.
const (
	begin = "<!-- Made from docs/promises by its test: go test ./docs/promises -update -->\n"
	end   = "<!-- until here -->\n"
)

// Markdown is the table.
func Markdown() string {
	var b strings.Builder
	for _, s := range Sections() {
		fmt.Fprintf(&b, "\n### %s\n\n| | tests |\n|---|---|\n", s.Title)
		for _, p := range s.Promises {
			names := make([]string, len(p.Tests))
			for i, name := range p.Tests {
				names[i] = "`" + name + "`"
			}
			fmt.Fprintf(&b, "| %s | %s |\n", p.Text, strings.Join(names, " "))
		}
	}
	return b.String() + "\n"
}
