// SPDX-License-Identifier: Apache-2.0
// Copyright The containerd-cloudhv Authors

package hack

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"
)

// testKVM is test-kvm.sh in a checkout of its own, whose set-up ends with a status and
// whose node runs a script instead of the tests.
type testKVM struct {
	t      *testing.T
	script string
	tools  string
}

func newTestKVM(t *testing.T, setup, node string) testKVM {
	t.Helper()
	root := t.TempDir()
	require.NoError(t, os.MkdirAll(filepath.Join(root, "hack", "node"), 0o700))
	for _, name := range []string{"lib.sh", "node/lib.sh", "node/test-kvm.sh", "node/summary.awk", "node/ci.list", "node/slow.list"} {
		data, err := os.ReadFile(name)
		require.NoError(t, err)
		require.NoError(t, os.WriteFile(filepath.Join(root, "hack", name), data, 0o700))
	}
	for name, text := range map[string]string{"setup.sh": setup, "run.sh": node} {
		require.NoError(t, os.WriteFile(filepath.Join(root, "hack", "node", name), []byte("#!/bin/bash\n"+text+"\n"), 0o700))
	}
	return testKVM{
		t: t, script: filepath.Join(root, "hack", "node", "test-kvm.sh"),
		tools: fakes(t, map[string]string{"go": "true", "gcc": "true"}),
	}
}

func (k testKVM) run(env []string, args ...string) (string, int) {
	k.t.Helper()
	return run(k.t, k.tools, append([]string{"VMM=", "RUN=", "SUBSET=", "CLOUD_HYPERVISOR="}, env...), k.script, args...)
}

// Where there is no node, the tests on KVM are skipped by name if they may be, and
// else a failure.
func TestKVMWithoutANode(t *testing.T) {
	t.Parallel()
	k := newTestKVM(t, "exit 3", "echo unexpected")
	out, code := k.run(nil, "--or-skip")
	require.Zero(t, code, out)
	require.Contains(t, out, "warning: end-to-end tests on KVM SKIPPED: ")
	out, code = k.run(nil)
	require.Equal(t, 1, code, out)
	require.NotContains(t, out, "unexpected")
	out, code = newTestKVM(t, "exit 5", "true").run(nil, "--or-skip")
	require.Equal(t, 5, code, out)
}

// Each hypervisor that is there is tested, and fails for itself.
func TestKVMHypervisors(t *testing.T) {
	t.Parallel()
	k := newTestKVM(t, "true", `echo "on=$E2E_VMM $E2E_ACCELERATOR $E2E_REQUIRE"; [[ $E2E_VMM != qemu ]]`)
	out, code := k.run([]string{"CLOUD_HYPERVISOR=/some/binary"})
	require.Equal(t, 1, code, out)
	require.Contains(t, out, "on=qemu kvm 1\n")
	require.Contains(t, out, "on=cloudhypervisor kvm 1\n")
	out, code = k.run([]string{"VMM=cloudhypervisor"})
	require.Zero(t, code, out)
	require.NotContains(t, out, "on=qemu")
}

// What fails is run once more, by itself; what fails twice has failed, and so has a run
// that names no test.
func TestKVMOnceMore(t *testing.T) {
	t.Parallel()
	const node = `echo "$1"; if [[ $1 == *TestB* ]]; then echo "--- %s: TestB (1.00s)"; exit %s; fi
echo "--- PASS: TestA (1.00s)"; echo "--- FAIL: TestB (1.00s)"; echo "    --- FAIL: TestB/c (1.00s)"; echo "--- FAIL: TestD (1.00s)"; exit 1`
	qemu := []string{"VMM=qemu"}
	out, code := newTestKVM(t, "true", fmt.Sprintf(node, "PASS", "0")).run(qemu)
	require.Zero(t, code, out)
	require.Contains(t, out, `-test.run \^\(TestB\|TestD\)\$ `)
	require.Contains(t, out, "once more: ^(TestB|TestD)$")
	out, code = newTestKVM(t, "true", fmt.Sprintf(node, "FAIL", "1")).run(qemu)
	require.Equal(t, 1, code, out)
	require.Equal(t, 1, strings.Count(out, "once more"))
	out, code = newTestKVM(t, "true", `echo "--- PASS: TestA (1.00s)"; exit 125`).run(qemu)
	require.Equal(t, 1, code, out)
	require.NotContains(t, out, "once more")
}

// listed are the tests that a list of the node's names, each of which is there.
func listed(t *testing.T, list string) (names []string) {
	t.Helper()
	text, err := os.ReadFile(filepath.Join("node", list))
	require.NoError(t, err)
	files, err := filepath.Glob("../e2e/*_test.go")
	require.NoError(t, err)
	var tests strings.Builder
	for _, file := range files {
		code, err := os.ReadFile(file)
		require.NoError(t, err)
		tests.Write(code)
	}
	for line := range strings.Lines(string(text)) {
		name, _, _ := strings.Cut(strings.TrimSpace(line), " ")
		if name == "" || strings.HasPrefix(name, "#") {
			continue
		}
		require.Contains(t, tests.String(), "\nfunc "+name+"(t *testing.T)", "%s names it", list)
		names = append(names, name)
	}
	return names
}

// The subset has a limit, and what there was no time for is named. A failure stays one.
func TestKVMSubset(t *testing.T) {
	t.Parallel()
	listed(t, "slow.list")
	names := listed(t, "ci.list")
	require.Greater(t, len(names), 2)
	subset := []string{"SUBSET=ci", "VMM=qemu"}
	const echo = `echo "$1 limit=$NODE_TIMEOUT handlers=$E2E_HANDLERS"; `
	out, code := newTestKVM(t, "true", echo+`echo "--- PASS: `+names[0]+` (1.00s)"; exit 124`).run(subset)
	require.Zero(t, code, out)
	require.Contains(t, out, `-test.run \^\(`+names[0]+`\|`+names[1])
	require.Contains(t, out, "limit=480 handlers=cloudhv")
	require.NotContains(t, out, names[0]+" SKIPPED")
	for _, name := range names[1:] {
		require.Contains(t, out, "warning: end-to-end tests on KVM: "+name+" SKIPPED: there was no time left")
	}
	for _, end := range []string{`echo "--- PASS: A (1.00s)"; echo "    --- FAIL: B/c (1.00s)"; exit 124`, `echo "--- PASS: A (1.00s)"; exit 125`} {
		out, code := newTestKVM(t, "true", end).run(subset)
		require.Equal(t, 1, code, "%s: %s", end, out)
	}
	// A run that failed is repeated, once.
	const once = `[[ ! -e $NODE_OUT.once ]] || { echo "=== RUN"; exit 0; }; touch "$NODE_OUT.once"; exit 1`
	out, code = newTestKVM(t, "true", once).run(subset)
	require.Zero(t, code, out)
	require.Contains(t, out, "a run failed")
	const twice = `echo "--- FAIL: A (1.00s)"; exit 1`
	out, code = newTestKVM(t, "true", twice).run(subset)
	require.Equal(t, 1, code, out)
	require.Equal(t, 2, strings.Count(out, "--- FAIL: A"), out)
	out, code = newTestKVM(t, "true", once).run([]string{"VMM=qemu"})
	require.Equal(t, 1, code, out)
	out, code = newTestKVM(t, "true", echo).run([]string{"VMM=qemu", "RUN=^TestX$"})
	require.Zero(t, code, out)
	require.Contains(t, out, `-test.run \^TestX\$`)
	require.Contains(t, out, "handlers=\n")
}
