// SPDX-License-Identifier: Apache-2.0
// Copyright The containerd-cloudhv Authors

package e2e

import (
	"cmp"
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/cloudhv/containerd-cloudhv/e2e/testimage"
	"github.com/cloudhv/containerd-cloudhv/e2e/testnode"
)

// operatorsPrograms are all that the operator's commands may use: another one is not found.
var operatorsPrograms = []string{
	"awk", "cat", "comm", "curl", "cut", "df", "du", "find", "grep", "install", "ip", "jq", "ls", "nsenter", "pgrep", "ps", "rm",
	"sort", "tail", "timeout", "touch", "xargs",
}

// onService are the commands that act on containerd's service, with what they are on
// a node of the tests, which has no systemd.
var onService = map[string]func(*testnode.Node, context.Context) error{
	"systemctl start containerd":                         (*testnode.Node).Start,
	"systemctl stop containerd":                          (*testnode.Node).Stop,
	"systemctl restart containerd":                       func(n *testnode.Node, ctx context.Context) error { return n.Restart(ctx, false) },
	"systemctl kill --kill-whom=main -s KILL containerd": (*testnode.Node).Kill,
}

// journal stands for journalctl, with these arguments only.
const journal = `#!/bin/bash
[ "$*" = "-u containerd -o cat --since -1h" ] || { echo "journalctl $*: not known here" >&2; exit 1; }
exec cat %q
`

// nothing is what a document says of a command that prints nothing.
const nothing = "(nothing)"

// command is one of a document's, with the lines that it has to print.
type command struct {
	text   string
	expect []string
}

// block is a block of commands below a heading, the which-th there.
type block struct {
	heading  string
	which    int
	commands []command
}

// readCommands reads the sh blocks of a document, which has no others.
func readCommands(t *testing.T, path string) (blocks []block) {
	t.Helper()
	text, err := os.ReadFile(path)
	require.NoError(t, err)
	heading, which, inside := "", 0, false
	for line := range strings.Lines(string(text)) {
		line = strings.TrimRight(line, "\n")
		switch {
		case strings.HasPrefix(line, "```"):
			if inside = !inside; inside {
				require.Equal(t, "```sh", line, "blocks of other kinds would not be run")
				blocks = append(blocks, block{heading: heading, which: which})
				which++
			}
		case !inside && strings.HasPrefix(line, "#"):
			heading, which = strings.TrimLeft(line, "# "), 0
		case !inside || line == "":
		default:
			b := &blocks[len(blocks)-1]
			if want, ok := strings.CutPrefix(line, "#> "); ok {
				require.NotEmpty(t, b.commands, "%s: %s", heading, line)
				last := &b.commands[len(b.commands)-1]
				last.expect = append(last.expect, want)
				continue
			}
			require.False(t, strings.HasPrefix(line, "#"), "a comment: %s", line)
			b.commands = append(b.commands, command{text: line})
		}
	}
	require.False(t, inside)
	return blocks
}

// operator is somebody at a node, with the document and a pod that lives.
type operator struct {
	t        *testing.T
	n        *testnode.Node
	programs string // PATH
	crictl   string // crictl's configuration
	here     *strings.Replacer
	pod      *pod
	ctr      *container
}

// TestOperations runs every command of docs/operations.md, and compares what it prints with the document.
func TestOperations(t *testing.T) {
	requireCloudHV(t)
	o := newOperator(t)
	blocks := readCommands(t, filepath.Join(o.n.Repo(), "docs", "operations.md"))
	require.Greater(t, len(blocks), 15)
	before := map[string][]func(){
		"Find a leak":                     {o.plantLeaks(blocks)},
		"A VMM that hangs":                {o.stopVMM},
		"A damaged record":                {o.damageRecord},
		"A state directory that was lost": {o.loseState},
	}
	for _, b := range blocks {
		name := strings.ReplaceAll(strings.ToLower(b.heading), " ", "-")
		t.Run(fmt.Sprint(name, b.which), func(t *testing.T) {
			o.t = t
			o.ensurePod()
			o.settle()
			if prepare := before[b.heading]; b.which < len(prepare) {
				prepare[b.which]()
			}
			for _, c := range b.commands {
				o.run(c)
			}
		})
		delete(before, b.heading)
	}
	require.Empty(t, before, "headings that the document does not have")
}

// TestOperationsDocument: the commands can be told from the text, and each that acts
// on the service has what stands for it; nothing stands for none. It needs no node.
func TestOperationsDocument(t *testing.T) {
	acts := map[string]bool{}
	for _, b := range readCommands(t, filepath.Join("..", "docs", "operations.md")) {
		require.NotEmpty(t, b.commands, b.heading)
		for _, c := range b.commands {
			out, err := exec.Command("/bin/bash", "-n", "-c", c.text).CombinedOutput()
			require.NoError(t, err, "%s: %s", c.text, out)
			if strings.Contains(c.text, "systemctl") {
				require.Contains(t, onService, c.text)
				acts[c.text] = true
			}
		}
	}
	require.Len(t, acts, len(onService))
}

// newOperator makes the node, with files of its own in the place of installed ones.
func newOperator(t *testing.T) *operator {
	repo := node(t).Repo()
	built := cmp.Or(os.Getenv("E2E_BIN"), filepath.Join(repo, "build", "bin"))
	guest := cmp.Or(os.Getenv("E2E_GUEST"), filepath.Join(repo, "build", "guest"))
	installed := t.TempDir()
	bin, share, programs := filepath.Join(installed, "bin"), filepath.Join(installed, "guest"), filepath.Join(installed, "programs")
	for _, args := range [][]string{
		{"-t", bin, built + "/containerd", built + "/containerd-shim-runc-v2", built + "/containerd-shim-cloudhv-v1", built + "/cloudhvctl", built + "/crictl"},
		{"-m", "0644", "-t", share, guest + "/vmlinux", guest + "/rootfs.erofs"},
	} {
		out, err := exec.Command("install", append([]string{"-D"}, args...)...).CombinedOutput()
		require.NoError(t, err, "%s", out)
	}
	// VMMs are no root, and open the guest's files by their path.
	for dir := share; dir != "/"; dir = filepath.Dir(dir) {
		st, err := os.Stat(dir)
		require.NoError(t, err)
		if st.Mode().Perm()&0o011 != 0o011 && strings.HasPrefix(dir, os.TempDir()+"/") {
			require.NoError(t, os.Chmod(dir, st.Mode().Perm()|0o011))
		}
	}
	address := freeAddress(t)
	n := poolNode(t, map[string]any{"min": 1, "max": 2}, func(o *testnode.Options) {
		o.BinDir, o.GuestDir, o.Metrics = bin, share, address
	})
	img, err := testimage.Helper(suite.helper)
	require.NoError(t, err)
	require.NoError(t, n.Import(testContext(t), testimage.HelperRef, img))
	require.NoError(t, n.AwaitPool(testContext(t), 1))
	t.Cleanup(func() { require.NoError(t, n.RemoveAllPods(testContext(t))) })
	o := &operator{t: t, n: n, programs: programs, crictl: filepath.Join(installed, "crictl.yaml")}
	require.NoError(t, os.WriteFile(o.crictl, fmt.Appendf(nil, "runtime-endpoint: %[1]s\nimage-endpoint: %[1]s\ntimeout: %[2]d\n",
		n.Endpoint(), int(testnode.Scale(2*time.Minute)/time.Second)), 0o600))
	require.NoError(t, os.Mkdir(programs, 0o700))
	for _, name := range operatorsPrograms {
		path, err := exec.LookPath(name)
		if err != nil && os.Getenv("E2E_REQUIRE") != "1" {
			t.Skip(err)
		}
		require.NoError(t, err)
		require.NoError(t, os.Symlink(path, filepath.Join(programs, name)))
	}
	for _, name := range []string{"cloudhvctl", "containerd", "crictl"} {
		require.NoError(t, os.Symlink(filepath.Join(bin, name), filepath.Join(programs, name)))
	}
	require.NoError(t, os.WriteFile(filepath.Join(programs, "journalctl"), fmt.Appendf(nil, journal, n.LogPath()), 0o700)) //nolint:gosec // it is run
	o.here = strings.NewReplacer(
		"/run/cloudhv", n.StateDir(), "/var/lib/cloudhv", n.CacheDir(), "127.0.0.1:1338", address,
		"/usr/local/bin", bin, "/usr/share/cloudhv", share, "build/bin", built, "build/guest", guest,
	)
	return o
}

// ensurePod makes a pod with a container unless the last one lives.
func (o *operator) ensurePod() {
	o.t.Helper()
	ctx := testContext(o.t)
	if o.pod != nil {
		o.pod.t = o.t
		r, err := o.n.Runtime().PodSandboxStatus(ctx, &runtimeapi.PodSandboxStatusRequest{PodSandboxId: o.pod.id})
		if err == nil && r.GetStatus().GetState() == runtimeapi.PodSandboxState_SANDBOX_READY {
			return
		}
		require.NoError(o.t, o.n.RemoveAllPods(ctx))
	}
	p := &pod{t: o.t, n: o.n, handler: testnode.CloudHV, cfg: o.n.PodConfig("operations")}
	id, err := o.n.RunPod(ctx, p.cfg, testnode.CloudHV)
	require.NoError(o.t, err, o.n.LogTail(4000))
	p.id = id
	o.pod, o.ctr = p, p.idle("idle")
	// Its processes are moved there after the start.
	require.NoError(o.t, testnode.Eventually(ctx, func(context.Context) error {
		if group := p.info().Cgroup; !strings.Contains(group, id) {
			return fmt.Errorf("the VMM is in the cgroup %q", group)
		}
		return nil
	}))
}

// settle waits until the pool makes no VM, which is not in all lists yet.
func (o *operator) settle() {
	o.t.Helper()
	require.NoError(o.t, testnode.Eventually(testContext(o.t), func(context.Context) error {
		if p := ctlJSON[ctlStatus](o.t, o.n, "status").Pool; p.Making > 0 || !p.Drained && p.Ready < p.Target {
			return fmt.Errorf("the pool has %v of %v VMs, and makes %v", p.Ready, p.Target, p.Making)
		}
		return nil
	}))
}

// shell runs a command of the document's and returns what it prints, and its error.
func (o *operator) shell(text string) (stdout, stderr string, err error) {
	ctx, cancel := context.WithTimeout(context.Background(), testnode.Scale(3*time.Minute))
	defer cancel()
	cmd := exec.CommandContext(ctx, "/bin/bash", "-euo", "pipefail", "-s")
	// By its input, so that the command does not find itself among the processes.
	cmd.Stdin = strings.NewReader(o.here.Replace(text) + "\n")
	cmd.Dir = o.n.Dir()
	cmd.Env = []string{
		"PATH=" + o.programs, "HOME=" + o.n.Dir("tmp"), "LC_ALL=C", "CONTAINERD_ADDRESS=" + o.n.Dir("c.sock"),
		"CRI_CONFIG_FILE=" + o.crictl, "POD=" + o.pod.id, "CONTAINER=" + o.ctr.id,
	}
	var out, errOut strings.Builder
	cmd.Stdout, cmd.Stderr = &out, &errOut
	err = cmd.Run()
	return out.String(), errOut.String(), err
}

// run runs a command, which has to succeed and to print what the document says.
func (o *operator) run(c command) {
	o.t.Helper()
	if act, ok := onService[c.text]; ok {
		require.Empty(o.t, c.expect, "%s prints nothing", c.text)
		require.NoError(o.t, act(o.n, testContext(o.t)), c.text)
		return
	}
	out, errOut, err := o.shell(c.text)
	o.t.Logf("%s\n%s%s", c.text, out, errOut)
	require.NoError(o.t, err, "%s\n%s%s%s", c.text, out, errOut, o.n.LogTail(2000))
	for _, want := range c.expect {
		if want == nothing {
			require.Empty(o.t, out, c.text)
			continue
		}
		want = o.here.Replace(strings.ReplaceAll(want, "$POD", o.pod.id))
		pattern := "(?m)^" + strings.ReplaceAll(regexp.QuoteMeta(want), "…", ".*") + "$"
		require.Regexp(o.t, pattern, out, c.text)
	}
}

// plantLeaks returns what shows that the commands that find nothing would find a leak.
func (o *operator) plantLeaks(blocks []block) func() {
	return func() {
		i := o.pod.info()
		id := strings.Repeat("1ea4", 16)
		stray := filepath.Join(o.n.StateDir(), id)
		disk := filepath.Join(o.n.CacheDir(), "scratch", id+".img")
		require.NoError(o.t, os.Mkdir(stray, 0o700))
		defer os.Remove(stray)
		require.NoError(o.t, os.WriteFile(disk, nil, 0o600))
		defer os.Remove(disk)
		process := exec.Command("/bin/sleep", "1000")
		process.Args = []string{"containerd-shim-cloudhv-v1 -sandbox " + stray, "1000"}
		require.NoError(o.t, process.Start())
		defer func() {
			_ = process.Process.Kill()
			_ = process.Wait()
		}()
		found := 0
		for _, b := range blocks {
			for _, c := range b.commands {
				if b.heading != "Find a leak" || !slices.Contains(c.expect, nothing) {
					continue
				}
				out, errOut, err := o.shell(c.text)
				require.NoError(o.t, err, errOut)
				assert.Contains(o.t, []string{id, strconv.Itoa(process.Process.Pid)}, strings.TrimSpace(out), c.text)
				found++
				if strings.Contains(c.text, "pgrep") {
					both, errOut, err := o.shell(strings.Replace(c.text, "comm -13", "comm -12", 1))
					require.NoError(o.t, err, errOut)
					assert.Subset(o.t, strings.Fields(both), []string{strconv.Itoa(i.VMMPid), strconv.Itoa(i.ShimPid)}, "they would be found")
				}
			}
		}
		require.Equal(o.t, 3, found)
	}
}

// stopVMM stops the VMM as a kernel does that does not come back from a call.
func (o *operator) stopVMM() {
	require.NoError(o.t, unix.Kill(o.pod.info().VMMPid, unix.SIGSTOP))
}

// damageRecord cuts the pod's record off while containerd is away.
func (o *operator) damageRecord() {
	require.NoError(o.t, o.n.Stop(testContext(o.t)))
	path := filepath.Join(o.n.StateDir(), o.pod.id, "record.json")
	text, err := os.ReadFile(path)
	require.NoError(o.t, err)
	require.NoError(o.t, os.WriteFile(path, text[:len(text)/2], 0o600))
	require.NoError(o.t, o.n.Start(testContext(o.t)))
}

// loseState removes what it can of the state directory while containerd is away, as
// rm -rf does, which a mount withstands: then containerd does not trust it any more.
func (o *operator) loseState() {
	require.NoError(o.t, o.n.Stop(testContext(o.t)))
	entries, err := os.ReadDir(o.n.StateDir())
	require.NoError(o.t, err)
	for _, e := range entries {
		if err := os.RemoveAll(filepath.Join(o.n.StateDir(), e.Name())); err != nil {
			require.ErrorIs(o.t, err, unix.EBUSY)
		}
	}
	require.NoError(o.t, o.n.Start(testContext(o.t)))
	out, _, err := o.n.Ctl(testContext(o.t), "status")
	require.Error(o.t, err)
	require.Contains(o.t, out, "was never this plugin's")
}
