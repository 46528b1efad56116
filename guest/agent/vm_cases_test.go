// SPDX-License-Identifier: Apache-2.0
// Copyright The containerd-cloudhv Authors

package main

import (
	"bytes"
	"fmt"
	"io"
	"net"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	guestv1 "github.com/cloudhv/containerd-cloudhv/guest/api/v1"
)

// testCase is one that runs in a VM, and if it needs none on the host too.
type testCase struct {
	name   string
	run    func(*vm, *testing.T)
	onlyVM bool
}

var testCases = []testCase{
	{"timing", (*vm).timing, false},
	{"container", (*vm).container, true},
	{"files", (*vm).files, false},
	{"footprint", (*vm).footprint, true},
	{"exit codes", (*vm).exitCodes, false},
	{"input and output", (*vm).inputOutput, false},
	{"stalled reader", (*vm).stalled, true},
	{"terminal", (*vm).terminal, false},
	{"exec", (*vm).exec, false},
	{"failures leave nothing", (*vm).failures, false},
	{"kill", (*vm).kill, false},
	{"pod pids", (*vm).podPids, false},
	{"pause", (*vm).pause, false},
	{"update", (*vm).update, true},
	{"out of memory", (*vm).outOfMemory, true},
	{"created only", (*vm).createdOnly, false},
	{"many", (*vm).many, false},
	{"bad requests", (*vm).badRequests, false},
	{"network", (*vm).network, true},
	{"resize", (*vm).resize, true},
	{"hot-plug", (*vm).hotPlug, true},
}

func (v *vm) runCases(t *testing.T, real bool) {
	for _, c := range testCases {
		if c.onlyVM && !real {
			continue
		}
		ok := t.Run(c.name, func(t *testing.T) {
			v.t = t
			c.run(v, t)
			v.nothingLeft()
		})
		v.t = t
		require.True(t, ok, "later cases need a sound agent")
	}
}

// rootDisk is the serial of the disk with the VM's own root file system.
const rootDisk = "root"

// warmUp rehearses and runs the throw-away container, which can be repeated and
// leaves nothing.
func (v *vm) warmUp(t *testing.T) {
	for range 3 {
		began := time.Now()
		resp, err := v.machine.Rehearse(v.ctx(), v.configureRequest())
		require.NoError(t, err)
		t.Logf("rehearsal: %v: %v", time.Since(began).Round(time.Millisecond), resp.GetSteps())
		began = time.Now()
		_, err = v.tasks.WarmUp(v.ctx(), &guestv1.WarmUpRequest{Spec: testSpec("false", "true"), ImageSerial: rootDisk})
		require.NoError(t, err)
		t.Logf("warm-up: %v", time.Since(began).Round(time.Millisecond))
	}
	_, err := v.machine.Rehearse(v.ctx(), &guestv1.ConfigureRequest{})
	require.Equal(t, codes.InvalidArgument, status.Code(err), "%v", err)
	_, err = v.tasks.WarmUp(v.ctx(), &guestv1.WarmUpRequest{Spec: []byte("{}"), ImageSerial: rootDisk})
	require.Equal(t, codes.InvalidArgument, status.Code(err), "%v", err)
}

// TestVM runs the agent as it is meant to be run.
func TestVM(t *testing.T) {
	v := bootVM(t)
	_, err := v.tasks.Create(v.ctx(), &guestv1.CreateRequest{Id: "early", Spec: testSpec("false", "true")})
	require.Equal(t, codes.FailedPrecondition, status.Code(err), "%v", err)
	v.warmUp(t)
	v.configure()
	v.nothingLeft()
	_, err = v.machine.Rehearse(v.ctx(), v.configureRequest())
	require.Equal(t, codes.FailedPrecondition, status.Code(err), "%v", err)
	_, err = v.tasks.WarmUp(v.ctx(), &guestv1.WarmUpRequest{Spec: testSpec("false", "true"), ImageSerial: rootDisk})
	require.Equal(t, codes.FailedPrecondition, status.Code(err), "%v", err)
	v.runCases(t, true)
	_, _ = v.machine.PowerOff(v.ctx(), &guestv1.PowerOffRequest{})
	select {
	case <-v.dead:
	case <-time.After(time.Minute):
		t.Fatal("the VM did not end")
	}
}

// TestVMNoNIC takes the VM's own network device from a pod that has no
// interface.
func TestVMNoNIC(t *testing.T) {
	v := bootVM(t)
	r := v.configureRequest()
	r.Interfaces, r.Routes = nil, nil
	_, err := v.machine.Configure(v.ctx(), r)
	require.NoError(t, err)
	out, _ := v.run("links", "ls /sys/class/net")
	require.NotContains(t, out, "eth")
	require.Contains(t, out, "lo\n")
}

// nothingLeft looks for what containers leave, as far as a container can see it.
func (v *vm) nothingLeft() {
	v.t.Helper()
	out, _ := v.run("census", "for d in /pod /run /run/crun /run/containers /run/scratch/layers; do (cd $d && echo */); done; cd /vmtmp; echo runc-process* pty*", func(r *guestv1.CreateRequest) {
		r.Spec = bytes.Replace(r.Spec, []byte(`"mounts":[`), []byte(`"mounts":[{"destination":"/pod","type":"bind","source":"/sys/fs/cgroup/pod","options":["rbind","ro"]},
			{"destination":"/vmtmp","type":"bind","source":"/tmp","options":["rbind","ro"]},
			{"destination":"/run","type":"bind","source":"/run","options":["rbind","ro"]},`), 1)
	})
	want := []string{"census/", "containers/ crun/ images/ pod/ scratch/", "census/", "census/", "census/ trash/", "runc-process* pty*", ""}
	require.Equal(v.t, want, strings.Split(out, "\n"), "other containers have left something")
}

func (v *vm) start(id, execID string) {
	v.t.Helper()
	_, err := v.tasks.Start(v.ctx(), &guestv1.StartRequest{Id: id, ExecId: execID})
	require.NoError(v.t, err)
}

func (v *vm) wait(id, execID string) *guestv1.WaitResponse {
	v.t.Helper()
	w, err := v.tasks.Wait(v.ctx(), &guestv1.WaitRequest{Id: id, ExecId: execID})
	require.NoError(v.t, err)
	return w
}

func (v *vm) delete(id, execID string) {
	v.t.Helper()
	_, err := v.tasks.Delete(v.ctx(), &guestv1.DeleteRequest{Id: id, ExecId: execID})
	require.NoError(v.t, err)
}

func (v *vm) signal(id, execID string, sig uint32, all bool) error {
	_, err := v.tasks.Kill(v.ctx(), &guestv1.KillRequest{Id: id, ExecId: execID, Signal: sig, All: all})
	return err
}

// end kills and deletes a container.
func (v *vm) end(id string) {
	v.t.Helper()
	require.NoError(v.t, v.signal(id, "", 9, false))
	v.wait(id, "")
	v.delete(id, "")
}

func (v *vm) execute(id, execID, script string, tty bool) net.Conn {
	v.t.Helper()
	sid, conn := v.stream()
	_, err := v.tasks.Exec(v.ctx(), &guestv1.ExecRequest{
		Id: id, ExecId: execID, Process: []byte(testProcess(fmt.Sprint(tty), script)), Stdio: &guestv1.Stdio{Stdout: sid, Terminal: tty},
	})
	require.NoError(v.t, err)
	return conn
}

func (v *vm) container(t *testing.T) {
	out, st := v.run("facts", "id; hostname; cat /etc/hosts /etc/hostname /etc/resolv.conf; cat /proc/mounts; nproc; date; ls -la / /dev; cat /proc/self/cgroup /proc/self/limits /proc/self/oom_score_adj; echo pid $$; exit 7")
	require.EqualValues(t, 7, st)
	t.Log(out)
	for _, want := range []string{"uid=0(root)", "web-0\n", "nameserver 10.0.0.10\n", "127.0.0.1\tlocalhost\n", "0::/\n", "\n100\n", "pid 1\n", "Max open files            1048576"} {
		require.Contains(t, out, want)
	}
}

// footprint shows what the agent itself takes.
func (v *vm) footprint(t *testing.T) {
	out, st := v.run("top", "grep -E '^(VmRSS|RssAnon|RssFile|Threads)' /vmproc/1/status; ls /vmproc/1/fd | wc -l", func(r *guestv1.CreateRequest) {
		r.Spec = bytes.Replace(r.Spec, []byte(`"mounts":[`), []byte(`"mounts":[{"destination":"/vmproc","type":"bind","source":"/proc","options":["rbind","ro"]},`), 1)
	})
	require.EqualValues(t, 0, st, out)
	t.Log(out)
}

func (v *vm) files(t *testing.T) {
	script := "echo x > /etc/hostname || echo refused; touch /x || echo refused; df /dev/shm; mount | grep shm"
	out, st := v.run("files", script, func(r *guestv1.CreateRequest) {
		r.Spec = bytes.Replace(r.Spec, []byte(`"root":{"path":"rootfs"}`), []byte(`"root":{"path":"rootfs","readonly":true}`), 1)
	})
	t.Log(out)
	require.EqualValues(t, 0, st)
	require.Equal(t, 2, strings.Count(out, "refused\n"))
}

func (v *vm) exitCodes(t *testing.T) {
	for script, want := range map[string]uint32{"exit 0": 0, "exit 1": 1, "exit 255": 255, "kill -9 $$; sleep 0.1": 0} {
		_, got := v.run("code", script)
		require.Equal(t, want, got, script)
	}
	for sig, want := range map[uint32]uint32{9: 137, 15: 143} {
		out := v.create("sig", "trap - TERM; echo up; exec sleep 1000", inPodPids)
		v.start("sig", "")
		up(t, out)
		require.NoError(t, v.signal("sig", "", sig, false))
		w := v.wait("sig", "")
		require.Equal(t, want, w.GetExitStatus())
		require.WithinDuration(t, time.Now(), w.GetExitedAt().AsTime(), 30*time.Second)
		v.delete("sig", "")
	}
}

// inPodPids lets default actions of signals work: PID 1 of a namespace ignores them.
func inPodPids(r *guestv1.CreateRequest) { r.PidNamespace = guestv1.PidNamespace_PID_POD }

// up waits for the line "up" of a script.
func up(t *testing.T, r io.Reader) {
	t.Helper()
	b := make([]byte, 3)
	_, err := io.ReadFull(r, b)
	require.NoError(t, err)
	require.Equal(t, "up", strings.TrimSpace(string(b)))
}

func (v *vm) exec(t *testing.T) {
	v.create("c", "sleep 1000")
	v.start("c", "")
	conn := v.execute("c", "e1", "sleep 0.2; echo $A; cat /proc/self/oom_score_adj /proc/self/cgroup; ps | wc -l; exit 5", false)
	st, err := v.tasks.State(v.ctx(), &guestv1.StateRequest{Id: "c", ExecId: "e1"})
	require.NoError(t, err)
	require.Equal(t, guestv1.Status_STATUS_CREATED, st.GetStatus())
	v.start("c", "e1")
	require.EqualValues(t, 5, v.wait("c", "e1").GetExitStatus())
	got, err := io.ReadAll(conn)
	require.NoError(t, err)
	require.True(t, strings.HasPrefix(string(got), "b\n100\n"), "%s", got)
	require.Contains(t, string(got), "0::/\n")
	v.delete("c", "e1")

	_, err = v.tasks.Exec(v.ctx(), &guestv1.ExecRequest{Id: "c", ExecId: "e2", Process: []byte(strings.Replace(testProcess("false", ""), `"sh"`, `"no-such"`, 1)), Stdio: &guestv1.Stdio{}})
	require.NoError(t, err)
	_, err = v.tasks.Start(v.ctx(), &guestv1.StartRequest{Id: "c", ExecId: "e2"})
	require.ErrorContains(t, err, "no-such")
	require.Equal(t, codes.Unknown, status.Code(err))
	require.NotZero(t, v.wait("c", "e2").GetExitStatus())
	v.delete("c", "e2")

	conn = v.execute("c", "e3", "echo up; exec sleep 1000", false)
	v.start("c", "e3")
	up(t, conn)
	pids, err := v.tasks.Pids(v.ctx(), &guestv1.PidsRequest{Id: "c"})
	require.NoError(t, err)
	require.Len(t, pids.GetProcesses(), 2)
	_, err = v.tasks.Delete(v.ctx(), &guestv1.DeleteRequest{Id: "c", ExecId: "e3"})
	require.Equal(t, codes.FailedPrecondition, status.Code(err))
	require.NoError(t, v.signal("c", "", 9, false))
	require.EqualValues(t, 137, v.wait("c", "").GetExitStatus())
	require.EqualValues(t, 137, v.wait("c", "e3").GetExitStatus())
	require.Equal(t, codes.NotFound, status.Code(v.signal("c", "", 9, true)))
	v.delete("c", "")
	_, err = v.tasks.Delete(v.ctx(), &guestv1.DeleteRequest{Id: "c"})
	require.Equal(t, codes.NotFound, status.Code(err))
}

func (v *vm) failures(t *testing.T) {
	for _, c := range []struct {
		name, from, to, want string
		code                 codes.Code
	}{
		{"missing binary", `"sh","-c"`, `"no-such-binary","-c"`, "no-such-binary", codes.Unknown},
		{"missing path", `"sh","-c"`, `"/no/such","-c"`, "/no/such", codes.Unknown},
		{"not executable", `"sh","-c"`, `"/etc/passwd","-c"`, "", codes.Unknown},
		{"wrong cwd", `"cwd":"/"`, `"cwd":"/etc/passwd"`, "", codes.Unknown},
		{"no such image", "", "", "no disk with serial", codes.NotFound},
		{"hooks", `"linux":{`, `"hooks":{"prestart":[{"path":"/bin/x"}]},"linux":{`, "hooks", codes.InvalidArgument},
		{"wrong json", `"linux":{`, `"linux":[`, "spec", codes.InvalidArgument},
	} {
		if c.name == "no such image" {
			continue // takes the whole limit for disks
		}
		sid, conn := v.stream()
		spec := bytes.Replace(testSpec("false", "true"), []byte(c.from), []byte(c.to), 1)
		if v.cmd == nil {
			spec = withoutLimits(spec)
		}
		_, err := v.tasks.Create(v.ctx(), &guestv1.CreateRequest{
			Id: "bad", Spec: spec,
			Rootfs: &guestv1.RootFS{ImageSerial: testImage}, Stdio: &guestv1.Stdio{Stdout: sid},
		})
		t.Logf("%s: %v", c.name, err)
		require.ErrorContains(t, err, c.want, c.name)
		require.Equal(t, c.code, status.Code(err), c.name)
		_, err = io.ReadAll(conn)
		require.NoError(t, err, "the stream has ended")
		_, err = v.tasks.State(v.ctx(), &guestv1.StateRequest{Id: "bad"})
		require.Equal(t, codes.NotFound, status.Code(err), c.name)
	}
}

// network looks at what Configure made, with tools of its own.
func (v *vm) network(t *testing.T) {
	out, st := v.run("net", "ip addr; ip route; ip -6 route; ip neigh; cat /proc/sys/net/ipv4/ping_group_range")
	t.Log(out)
	require.EqualValues(t, 0, st)
	for _, want := range []string{
		"eth0", "mtu 1400", "inet 10.22.0.5/24 brd 10.22.0.255", "inet6 fd00::5/64",
		"default via 10.22.0.1 dev eth0", "192.168.7.0/24 via 169.254.1.1 dev eth0", "default via fd00::1",
		"10.22.0.9 dev eth0 lladdr 02:00:00:00:00:09", "0\t2147483647",
	} {
		require.Contains(t, out, want)
	}
}

func (v *vm) createdOnly(t *testing.T) {
	v.create("created", "true")
	_, err := v.tasks.Create(v.ctx(), &guestv1.CreateRequest{Id: "created", Spec: testSpec("false", "true"), Rootfs: &guestv1.RootFS{ImageSerial: testImage}})
	require.Equal(t, codes.AlreadyExists, status.Code(err), "%v", err)
	v.delete("created", "")
	v.create("killed", "true")
	require.NoError(t, v.signal("killed", "", 9, false))
	require.EqualValues(t, 137, v.wait("killed", "").GetExitStatus())
	_, err = v.tasks.Start(v.ctx(), &guestv1.StartRequest{Id: "killed"})
	require.Equal(t, codes.FailedPrecondition, status.Code(err), "%v", err)
	v.delete("killed", "")
}

func (v *vm) many(t *testing.T) {
	const n = 10
	began := time.Now()
	errs := make(chan error, n)
	for i := range n {
		id := fmt.Sprintf("many-%d", i)
		conn := v.create(id, "echo "+id)
		go func() {
			_, err := v.tasks.Start(t.Context(), &guestv1.StartRequest{Id: id})
			if err == nil {
				var out []byte
				out, err = io.ReadAll(conn)
				if err == nil && string(out) != id+"\n" {
					err = fmt.Errorf("output of %s: %q", id, out)
				}
			}
			if err == nil {
				_, err = v.tasks.Wait(t.Context(), &guestv1.WaitRequest{Id: id})
			}
			if err == nil {
				_, err = v.tasks.Delete(t.Context(), &guestv1.DeleteRequest{Id: id})
			}
			errs <- err
		}()
	}
	for range n {
		require.NoError(t, <-errs)
	}
	t.Logf("%d containers in %v", n, time.Since(began).Round(time.Millisecond))
}

func (v *vm) badRequests(t *testing.T) {
	for _, r := range []*guestv1.CreateRequest{
		{},
		{Id: "../x"},
		{Id: strings.Repeat("x", 200)},
		{Id: "x"},
		{Id: "x", Spec: []byte("{}")},
		{Id: "x", Spec: []byte(`{"process":{"args":["a"]},"linux":null}`)},
		{Id: "x", Spec: testSpec("false", "true")},
		{Id: "x", Spec: testSpec("false", "true"), Rootfs: &guestv1.RootFS{ImageSerial: "../../etc"}},
		{Id: "x", Spec: testSpec("false", "true"), Rootfs: &guestv1.RootFS{ImageSerial: testImage}, PidNamespace: 99},
		{Id: "x", Spec: bytes.Repeat([]byte("x"), 1<<20+1)},
	} {
		_, err := v.tasks.Create(v.ctx(), r)
		require.Equal(t, codes.InvalidArgument, status.Code(err), "%v", err)
	}
	_, err := v.tasks.Create(v.ctx(), &guestv1.CreateRequest{Id: "x", Stdio: &guestv1.Stdio{Stdout: strings.Repeat("0", 32)}})
	require.Equal(t, codes.NotFound, status.Code(err), "%v", err)
}

func (v *vm) resize(t *testing.T) {
	for _, n := range []uint32{1, 2} {
		began := time.Now()
		r, err := v.machine.Resize(v.ctx(), &guestv1.ResizeRequest{Vcpus: n, MemoryBytes: 256 << 20})
		require.NoError(t, err)
		require.Equal(t, n, r.GetVcpusOnline())
		t.Logf("%d vCPUs in %v", n, time.Since(began).Round(time.Millisecond))
	}
	_, err := v.machine.Resize(v.ctx(), &guestv1.ResizeRequest{Vcpus: 64})
	require.Equal(t, codes.FailedPrecondition, status.Code(err), "%v", err)
}

// timing prints how long the calls of a container's life take.
func (v *vm) timing(t *testing.T) {
	for i := range 5 {
		id := fmt.Sprintf("time-%d", i)
		var line strings.Builder
		step := func(name string, fn func() error) {
			began := time.Now()
			require.NoError(t, fn())
			fmt.Fprintf(&line, "%s %.1f ", name, float64(time.Since(began).Microseconds())/1000)
		}
		step("info", func() error { _, err := v.machine.Info(v.ctx(), &guestv1.InfoRequest{}); return err })
		step("stream+create", func() error { v.create(id, "sleep 1000"); return nil })
		step("start", func() error { _, err := v.tasks.Start(v.ctx(), &guestv1.StartRequest{Id: id}); return err })
		step("exec", func() error {
			_, err := v.tasks.Exec(v.ctx(), &guestv1.ExecRequest{Id: id, ExecId: "e", Process: []byte(testProcess("false", "true")), Stdio: &guestv1.Stdio{}})
			return err
		})
		step("start-exec", func() error {
			_, err := v.tasks.Start(v.ctx(), &guestv1.StartRequest{Id: id, ExecId: "e"})
			return err
		})
		step("wait-exec", func() error {
			_, err := v.tasks.Wait(v.ctx(), &guestv1.WaitRequest{Id: id, ExecId: "e"})
			return err
		})
		step("stats", func() error { _, err := v.tasks.Stats(v.ctx(), &guestv1.StatsRequest{Id: id}); return err })
		step("kill", func() error { return v.signal(id, "", 9, false) })
		step("wait", func() error { _, err := v.tasks.Wait(v.ctx(), &guestv1.WaitRequest{Id: id}); return err })
		step("delete", func() error { _, err := v.tasks.Delete(v.ctx(), &guestv1.DeleteRequest{Id: id}); return err })
		t.Log("ms: " + line.String())
	}
}
