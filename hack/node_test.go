// SPDX-License-Identifier: Apache-2.0
// Copyright The containerd-cloudhv Authors

package hack

import (
	"bytes"
	"crypto/sha256"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
)

// machine stands for QEMU and its guest: it does with what run.sh hands over what
// inside.sh would do. What becomes of it is chosen by the command's first word.
const machine = `
	ctl= out= console= dir=
	for a; do
		case $a in
		local,id=ctl,*) ctl=${a#*path=}; ctl=${ctl%%,*} ;;
		local,id=out,*) dir=${a#*path=}; dir=${dir%%,*} ;;
		file,id=out,*) out=${a#*path=} ;;
		file,id=err,*) err=${a#*path=} ;;
		file,id=console,*) console=${a#*path=} ;;
		esac
	done
	echo $$ >"$NODE_PID"
	exec 8>"$out" 9>"$err"
	echo booting >"$console"
	read -r what _ <"$ctl/command"
	case $what in
	refuse) echo "no such machine" >&2; exit 1 ;;
	reset) exit 0 ;;
	crash) kill -SEGV $$; sleep 1 ;;
	hang) exec sleep 1000 ;;
	panic) printf 'one\r\n[ 1.0] Kernel panic - not syncing: of what\r\n' >>"$console"; exit 0 ;;
	esac
	cd "$(<"$ctl/directory")"
	touch "$ctl/started"
	env -i OUT="$dir" setpriv --pdeathsig KILL bash -c 'source "$0/environment"; exec bash "$0/command"' "$ctl" >&8 2>&9
	echo $? >"$ctl/status.new"
	mv "$ctl/status.new" "$ctl/status"
	[[ $what != stay* ]] || exec sleep 1000`

// nodeCommand is run.sh with that machine; its process ID is in the file pid.
func nodeCommand(t *testing.T, env []string, args ...string) (cmd *exec.Cmd, pid string) {
	t.Helper()
	dir := t.TempDir()
	cache := filepath.Join(dir, "cache")
	require.NoError(t, os.MkdirAll(filepath.Join(cache, "qemu"), 0o700))
	require.NoError(t, os.WriteFile(filepath.Join(cache, "initrd"), nil, 0o600))
	require.NoError(t, os.WriteFile(filepath.Join(cache, "qemu", "run"), []byte("#!/bin/bash\n"+machine+"\n"), 0o700))
	tmp := filepath.Join(dir, "tmp")
	require.NoError(t, os.Mkdir(tmp, 0o700))
	pid = filepath.Join(dir, "pid")
	// A caller may ignore signals, as nohup does, and then so would the script.
	cmd = exec.Command("env", append([]string{"--default-signal", "./node/run.sh"}, args...)...)
	cmd.Env = append(os.Environ(), append([]string{
		"NODE_CACHE=" + cache, "NODE_OUT=" + filepath.Join(dir, "out"), "NODE_PID=" + pid,
		"NODE_DISK=64", "TMPDIR=" + tmp, "NO_COLOR=1",
	}, env...)...)
	t.Cleanup(func() {
		left, err := os.ReadDir(tmp)
		require.NoError(t, err)
		require.Empty(t, left, "what run.sh has left")
	})
	return cmd, pid
}

// node runs a command in that machine, which must be gone then.
func node(t *testing.T, env []string, args ...string) (stdout, stderr string, code int) {
	t.Helper()
	var out, errOut bytes.Buffer
	cmd, pid := nodeCommand(t, env, args...)
	cmd.Stdout, cmd.Stderr = &out, &errOut
	err := cmd.Run()
	if exit := (&exec.ExitError{}); !errors.As(err, &exit) {
		require.NoError(t, err)
	}
	requireGone(t, pid)
	return out.String(), errOut.String(), cmd.ProcessState.ExitCode()
}

// requireGone waits until the process whose ID is in a file has ended.
func requireGone(t *testing.T, file string) {
	t.Helper()
	text, err := os.ReadFile(file)
	require.NoError(t, err)
	pid, err := strconv.Atoi(strings.TrimSpace(string(text)))
	require.NoError(t, err)
	require.Eventually(t, func() bool { return errors.Is(syscall.Kill(pid, 0), syscall.ESRCH) }, 20*time.Second, 20*time.Millisecond, "the machine lives")
}

// A command's output, exit status and files come out of the node as they are.
func TestNodeRunsACommand(t *testing.T) {
	t.Parallel()
	for _, code := range []int{0, 1, 7, 124, 125, 255} {
		out, errOut, got := node(t, nil, "echo out; echo err >&2; exit "+strconv.Itoa(code))
		require.Equal(t, code, got)
		require.Equal(t, "out\n", out)
		require.Equal(t, "err\n", errOut)
	}
	dir := t.TempDir()
	script := `echo "$PWD $HOME $E2E_NAME ${SECRET-none} $E2E_COUNTS"; printf "a b" >"$OUT/a file"; kill -9 $$`
	out, _, code := node(t, []string{"NODE_OUT=" + dir, "E2E_NAME=x  y", "SECRET=s"}, script)
	require.Equal(t, 128+9, code)
	wd, err := os.Getwd()
	require.NoError(t, err)
	require.Equal(t, wd+" /root x  y none small\n", out)
	text, err := os.ReadFile(filepath.Join(dir, "a file"))
	require.NoError(t, err)
	require.Equal(t, "a b", string(text))
	_, errOut, code := node(t, nil, "stay() { true; }; exit 3")
	require.Equal(t, 3, code, errOut)
}

// Two nodes do not put out into one directory.
func TestNodeWhoseOutputIsAnothers(t *testing.T) {
	t.Parallel()
	dir, err := os.Open(t.TempDir())
	require.NoError(t, err)
	defer dir.Close()
	require.NoError(t, syscall.Flock(int(dir.Fd()), syscall.LOCK_EX))
	cmd, pid := nodeCommand(t, []string{"NODE_OUT=" + dir.Name()}, "echo unexpected")
	out, err := cmd.CombinedOutput()
	require.Error(t, err)
	require.Contains(t, string(out), "another node has "+dir.Name())
	require.NotContains(t, string(out), "unexpected")
	require.NoFileExists(t, pid, "it began")
}

// What breaks is told by name, and ends.
func TestNodeBreaks(t *testing.T) {
	t.Parallel()
	_, errOut, code := node(t, nil, "panic")
	require.Equal(t, 125, code)
	require.Contains(t, errOut, "error: emulated node: its kernel panicked\n")
	require.Contains(t, errOut, "    | booting\n    | one\n    | [ 1.0] Kernel panic - not syncing: of what\n")
	_, errOut, code = node(t, nil, "refuse")
	require.Equal(t, 125, code)
	require.Contains(t, errOut, "it ended without an exit status: QEMU's is 1, no such machine")
	_, errOut, code = node(t, nil, "reset")
	require.Equal(t, 125, code)
	require.Contains(t, errOut, "it reset itself: no triple fault")
	_, errOut, code = node(t, nil, "crash")
	require.Equal(t, 125, code)
	require.Contains(t, errOut, "it ended without an exit status: QEMU's is 139 (SIGSEGV)")
	_, errOut, code = node(t, []string{"NODE_BOOT=1"}, "hang")
	require.Equal(t, 125, code)
	require.Regexp(t, `it was not up within 1 s \(NODE_BOOT\)\n    its console \(all of it is in [^\n]+/console.log\):\n    \| booting\n`, errOut)
	out, errOut, code := node(t, []string{"NODE_TIMEOUT=2"}, "echo before; exec sleep 1000")
	require.Equal(t, 124, code)
	require.Equal(t, "before\n", out)
	require.Contains(t, errOut, "it was ended at its limit of 2 s (NODE_TIMEOUT)")
	missing, code := run(t, t.TempDir(), []string{"NODE_CACHE=/nonexistent/cache"}, "./node/run.sh", "true")
	require.Equal(t, 1, code)
	require.Contains(t, missing, "/nonexistent/cache is not there")
}

// awaitFile waits until a file has something in it.
func awaitFile(t *testing.T, path string) {
	t.Helper()
	require.Eventually(t, func() bool { b, err := os.ReadFile(path); return err == nil && len(b) > 0 }, 20*time.Second, 10*time.Millisecond)
}

// A signal ends the node, and so does the end of whoever called, even by SIGKILL.
func TestNodeEndsWithItsCaller(t *testing.T) {
	t.Parallel()
	for signal, want := range map[syscall.Signal]int{syscall.SIGINT: 130, syscall.SIGTERM: 143, syscall.SIGHUP: 129} {
		cmd, pid := nodeCommand(t, nil, "exec sleep 1000")
		require.NoError(t, cmd.Start())
		awaitFile(t, pid)
		require.NoError(t, cmd.Process.Signal(signal))
		require.Error(t, cmd.Wait())
		require.Equal(t, want, cmd.ProcessState.ExitCode())
		requireGone(t, pid)
	}
	inner, pid := nodeCommand(t, nil, "exec sleep 1000")
	caller := exec.Command("env", "--default-signal", "bash", "-c", "./node/run.sh 'exec sleep 1000'; true")
	caller.Env = inner.Env
	require.NoError(t, caller.Start())
	awaitFile(t, pid)
	require.NoError(t, caller.Process.Kill())
	require.Error(t, caller.Wait())
	requireGone(t, pid)
	tmp := filepath.Join(filepath.Dir(pid), "tmp")
	require.Eventually(t, func() bool { left, err := os.ReadDir(tmp); return err == nil && len(left) == 0 }, 20*time.Second, 20*time.Millisecond)
}

// Whoever reads no more of the output has had enough of the node.
func TestNodeEndsWithItsReader(t *testing.T) {
	t.Parallel()
	cmd, pid := nodeCommand(t, nil, "yes")
	reader, err := cmd.StdoutPipe()
	require.NoError(t, err)
	require.NoError(t, cmd.Start())
	_, err = reader.Read(make([]byte, 2))
	require.NoError(t, err)
	require.NoError(t, reader.Close())
	require.Error(t, cmd.Wait())
	require.Equal(t, 141, cmd.ProcessState.ExitCode())
	requireGone(t, pid)
}

// What the node is made of is not missed in silence, and nothing half made stays.
func TestNodeCannotBeMade(t *testing.T) {
	t.Parallel()
	dir := fakes(t, map[string]string{"apt-get": `[[ $1 != indextargets ]] || { echo "Debian|main|$VERSION_CODENAME|http://d"; exit; }; echo "E: no network" >&2; exit 100`})
	cache := filepath.Join(t.TempDir(), "node")
	out, code := run(t, dir, []string{"NODE_CACHE=" + cache}, "./node/setup.sh")
	require.Equal(t, 3, code, out)
	require.Regexp(t, "warning: emulated node: (no package source answers|its kernel is Debian's)", out)
	left, err := os.ReadDir(filepath.Dir(cache))
	require.NoError(t, err)
	require.Empty(t, left)
}

// The end of a run names what did not run.
func TestNodeSummary(t *testing.T) {
	t.Parallel()
	log := filepath.Join(t.TempDir(), "log")
	require.NoError(t, os.WriteFile(log, []byte(`hypervisor: qemu 7.2, accelerator kvm
=== RUN   TestA
    helpers_test.go:52: cloudhv: qemu 7.2, accelerator kvm
=== RUN   TestA/runc
    a_test.go:9: NOT TESTED: this host has no IPv6
=== RUN   TestA/other
    life.go:88: cannot make cgroups
=== NAME  TestA
    helpers_test.go:60: this is of the whole
--- PASS: TestA (100.01s)
    --- SKIP: TestA/runc (0.00s)
    --- SKIP: TestA/other (0.00s)
--- FAIL: TestB (12.50s)
--- PASS: TestC (1.00s)
`), 0o600))
	out, code := run(t, t.TempDir(), nil, "awk", "-v", "vmm=qemu", "-f", "node/summary.awk", log)
	require.Zero(t, code)
	require.Equal(t, `    qemu: 2 passed, 1 failed, 2 skipped, on qemu 7.2, accelerator kvm
    skipped TestA/runc: NOT TESTED: this host has no IPv6
    skipped TestA/other: cannot make cgroups
    FAILED TestB
       100 s TestA
        12 s TestB
`, out)
}

// A program whose sum is another is not installed, and one that cannot be had is told.
func TestSetUpOfCloudHypervisor(t *testing.T) {
	t.Parallel()
	const script = "./setup/cloud-hypervisor.sh"
	dir := t.TempDir()
	source, bin := filepath.Join(dir, "source"), filepath.Join(dir, "bin")
	program := []byte("#!/bin/sh\necho cloud-hypervisor v53.0\n")
	require.NoError(t, os.WriteFile(source, program, 0o600))
	env := []string{"BIN=" + bin, "CLOUD_HYPERVISOR_URL=file://" + source}
	out, code := run(t, dir, env, script)
	require.Equal(t, 1, code, out)
	require.Regexp(t, "what came has the SHA-256 [0-9a-f]{64}\nand not [0-9a-f]{64}, so it is not installed", out)
	left, err := os.ReadDir(bin)
	require.NoError(t, err)
	require.Empty(t, left)
	env = append(env, fmt.Sprintf("CLOUD_HYPERVISOR_SHA256=%x", sha256.Sum256(program)))
	out, code = run(t, dir, env, script)
	require.Zero(t, code, out)
	require.Contains(t, out, "cloud-hypervisor v53.0, in "+filepath.Join(bin, "cloud-hypervisor"))
	require.NoError(t, os.Remove(source))
	out, code = run(t, dir, env, script)
	require.Zero(t, code, out)
	require.Contains(t, out, "up to date")
	require.NoError(t, os.RemoveAll(bin))
	out, code = run(t, dir, env, script)
	require.Equal(t, 1, code, out)
	require.Contains(t, out, "cannot be downloaded here: ")
}
