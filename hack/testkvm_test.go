// SPDX-License-Identifier: Apache-2.0
// Copyright The containerd-cloudhv Authors

package hack

import (
	"fmt"
	"os"
	"os/exec"
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

// compiler makes test programs that only list their tests.
const compiler = `[[ $1 == test && $2 == -c ]] || exit 0
cat >"$4" <<'EOF'
#!/bin/bash
[[ $1 == -test.list ]] || exit 1
printf '%s\n' TestA TestB TestC TestD | grep -E "$2"
EOF
chmod +x "$4"`

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
		tools: fakes(t, map[string]string{"go": compiler, "gcc": "true", "mkfs.erofs": "true"}),
	}
}

func (k testKVM) run(env []string, args ...string) (string, int) {
	k.t.Helper()
	return run(k.t, k.tools, append([]string{"VMM=", "RUN=", "SUBSET=", "SUITE=e2e", "CLOUD_HYPERVISOR="}, env...), k.script, args...)
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
	k := newTestKVM(t, "true", `echo "on=$E2E_VMM $E2E_ACCELERATOR $E2E_REQUIRE"; [[ $E2E_VMM != qemu ]] || exit 1; printf -- "--- PASS: %s (1s)\n" TestA TestB TestC TestD`)
	binary := filepath.Join(t.TempDir(), "ch")
	require.NoError(t, os.WriteFile(binary, []byte("#!/bin/sh\n"), 0o700))
	out, code := k.run([]string{"CLOUD_HYPERVISOR=" + binary})
	require.Equal(t, 1, code, out)
	require.Contains(t, out, "on=qemu kvm 1\n")
	require.Contains(t, out, "on=cloudhypervisor kvm 1\n")
	out, code = k.run([]string{"VMM=cloudhypervisor"})
	require.Zero(t, code, out)
	require.NotContains(t, out, "on=qemu")
	// The node's /tmp is another.
	k = newTestKVM(t, "true", `echo "binary=$CLOUD_HYPERVISOR"; printf -- "--- PASS: %s (1s)\n" TestA TestB TestC TestD`)
	out, code = k.run([]string{"VMM=cloudhypervisor", "CLOUD_HYPERVISOR=" + binary})
	require.Zero(t, code, out)
	require.Regexp(t, `binary=/.*/build/kvm/cloud-hypervisor\n`, out)
	out, code = k.run([]string{"CLOUD_HYPERVISOR=" + binary + "-missing"})
	require.Equal(t, 1, code, out)
	require.Contains(t, out, "there is no program")
	out, code = k.run(nil)
	require.Zero(t, code, out)
	if _, err := exec.LookPath("cloud-hypervisor"); err != nil {
		require.Contains(t, out, "on Cloud Hypervisor SKIPPED: there is no cloud-hypervisor on PATH")
	} else {
		require.Contains(t, out, "vmm = cloudhypervisor")
	}
}

// What fails is tried once more; what fails twice has failed, and so has a run that leaves
// something behind. What a node has not come to is run in another one.
func TestKVMOnceMore(t *testing.T) {
	t.Parallel()
	const (
		first = `echo "run: $1"; n=$(basename "$NODE_OUT"); pass() { printf -- '--- PASS: %s (1.00s)\n' "$@"; }
if [[ $n == 1 ]]; then `
		fails = `pass TestA TestC; echo "--- FAIL: TestB (1.00s)"; echo "    --- FAIL: TestB/c (1.00s)"; echo "--- FAIL: TestD (1.00s)"; exit 1; fi; `
		dies  = `echo "=== RUN   TestA"; echo "=== PAUSE TestA"; echo "=== RUN   TestB"; pass TestB; echo "=== RUN   TestC"; exit 125; fi; `
	)
	for name, tc := range map[string]struct {
		node string
		code int
		runs int
		says []string
	}{
		"passes then":       {first + fails + "pass TestB TestD", 0, 2, []string{"run 2 (", ": TestB TestD", "passed in another try TestB", `-test.run \^\(TestB\|TestD\)\$`}},
		"fails twice":       {first + fails + `pass TestD; echo "--- FAIL: TestB (1.00s)"; exit 1`, 1, 2, []string{"qemu: FAILED: TestB"}},
		"leaves something":  {first + `pass TestA TestC TestD; echo "--- FAIL: TestB (1s)"; echo "FAIL: e2e: after all tests: a mount"; exit 1; fi; pass TestB`, 1, 2, []string{"FAILED: what run 1 left"}},
		"leaves goroutines": {first + `pass TestA TestC TestD; echo "--- FAIL: TestB (1s)"; echo "FAIL: faults: something"; exit 1; fi; pass TestB`, 1, 2, []string{"FAILED: what run 1 left"}},
		"fails without one": {first + "pass TestA TestB TestC TestD; exit 1; fi", 1, 1, []string{"FAILED: run 1 itself, with status 1"}},
		"ends in between":   {first + dies + "pass TestA TestC TestD", 0, 2, []string{": TestA TestC TestD"}},
		"ends there again":  {first + dies + `echo "=== RUN   TestC"; exit 125`, 1, 4, []string{"FAILED: TestC", "NOT RUN: TestA TestD"}},
		"never begins":      {"exit 125", 1, 2, []string{"NOT RUN: TestA TestB TestC TestD"}},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			out, code := newTestKVM(t, "true", tc.node).run([]string{"VMM=qemu"})
			require.Equal(t, tc.code, code, out)
			require.Contains(t, out, fmt.Sprint("qemu: runs: ", tc.runs))
			for _, text := range tc.says {
				require.Contains(t, out, text)
			}
		})
	}
	k := newTestKVM(t, "true", `echo "run: $1"; echo "--- PASS: TestA (1s)"`)
	out, code := k.run([]string{"VMM=qemu", "RUN=TestA/x"})
	require.Zero(t, code, out)
	require.Contains(t, out, `-test.run \^\(TestA\)\$/x `)
	out, code = k.run([]string{"VMM=qemu", "RUN=TestX"})
	require.Equal(t, 1, code, out)
	require.Contains(t, out, "no test of e2e matches RUN=TestX")
	k = newTestKVM(t, "true", `basename "$REALVM_IMAGE"; printf -- "--- PASS: %s (1s)\n" TestA TestB TestC TestD`)
	out, code = k.run([]string{"VMM=cloudhypervisor", "SUITE=driver"})
	require.Zero(t, code, out)
	require.Contains(t, out, "cloudhypervisor-driver: runs: 1")
	require.Contains(t, out, "init.erofs")
	out, code = k.run([]string{"VMM=qemu", "SUITE=drivers"})
	require.Equal(t, 1, code, out)
	require.Contains(t, out, "SUITE=drivers: there are e2e, faults and driver")
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
	for _, end := range []string{"exit 124", `[[ $NODE_OUT == */1 ]] || exit 124; echo "--- FAIL: A (1.00s)"; exit 1`} {
		out, code := newTestKVM(t, "true", end).run(subset)
		require.NotZero(t, code, "%s: %s", end, out)
	}
	// A run that failed is repeated, once, if there is time.
	const once = `[[ $NODE_OUT == */1 ]] || { echo "=== RUN"; exit 0; }; exit 1`
	out, code = newTestKVM(t, "true", once).run(subset)
	require.Zero(t, code, out)
	require.Contains(t, out, "a run failed")
	out, code = newTestKVM(t, "true", once).run(append([]string{"NODE_TIMEOUT=59"}, subset...))
	require.Equal(t, 1, code, out)
	require.NotContains(t, out, "once more")
	const twice = `echo "--- FAIL: A (1.00s)"; exit 1`
	out, code = newTestKVM(t, "true", twice).run(subset)
	require.Equal(t, 1, code, out)
	require.Equal(t, 2, strings.Count(out, "--- FAIL: A"), out)
}
