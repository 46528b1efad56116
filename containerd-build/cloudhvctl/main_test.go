// SPDX-License-Identifier: Apache-2.0
// Copyright The containerd-cloudhv Authors

package main

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"
	"unicode"
	"unicode/utf8"

	"github.com/containerd/errdefs"
	"github.com/containerd/errdefs/pkg/errgrpc"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
	"google.golang.org/grpc"
	"google.golang.org/protobuf/types/known/durationpb"
	"google.golang.org/protobuf/types/known/timestamppb"

	ctlv1 "github.com/cloudhv/containerd-cloudhv/controller/ctlapi/v1"
)

// server answers as it is told.
type server struct {
	ctlv1.UnimplementedControlServer
	status  *ctlv1.StatusResponse
	vms     *ctlv1.ListResponse
	console []string
	err     error
	filled  []uint32
	// stuck calls answer when their caller leaves.
	stuck bool
}

func (s *server) Status(context.Context, *ctlv1.StatusRequest) (*ctlv1.StatusResponse, error) {
	return s.status, errgrpc.ToGRPC(s.err)
}

func (s *server) List(context.Context, *ctlv1.ListRequest) (*ctlv1.ListResponse, error) {
	return s.vms, errgrpc.ToGRPC(s.err)
}

func (s *server) Console(req *ctlv1.ConsoleRequest, stream grpc.ServerStreamingServer[ctlv1.ConsoleResponse]) error {
	if s.err != nil {
		return errgrpc.ToGRPC(s.err)
	}
	if err := stream.Send(&ctlv1.ConsoleResponse{VmId: "vm-of-" + req.GetId(), PodId: req.GetId()}); err != nil {
		return err
	}
	for _, part := range s.console {
		if err := stream.Send(&ctlv1.ConsoleResponse{Data: []byte(part)}); err != nil {
			return err
		}
	}
	return nil
}

func (s *server) Drain(ctx context.Context, _ *ctlv1.DrainRequest) (*ctlv1.DrainResponse, error) {
	if s.stuck {
		<-ctx.Done()
	}
	return &ctlv1.DrainResponse{Ended: 3}, errgrpc.ToGRPC(s.err)
}

func (s *server) Fill(_ context.Context, req *ctlv1.FillRequest) (*ctlv1.FillResponse, error) {
	s.filled = append(s.filled, req.GetCount())
	return &ctlv1.FillResponse{Ready: 4}, errgrpc.ToGRPC(s.err)
}

func (s *server) Rebuild(context.Context, *ctlv1.RebuildRequest) (*ctlv1.RebuildResponse, error) {
	return &ctlv1.RebuildResponse{Snapshot: &ctlv1.Snapshot{Id: "abc-1", Bytes: 5 << 20, Current: true}}, errgrpc.ToGRPC(s.err)
}

// serve serves on a socket, whose path it returns. Without a service it is a
// containerd that is not ours.
func serve(t *testing.T, s *server) string {
	t.Helper()
	dir, err := os.MkdirTemp("", "ctl")
	require.NoError(t, err)
	t.Cleanup(func() { require.NoError(t, os.RemoveAll(dir)) })
	path := filepath.Join(dir, "s")
	l, err := net.Listen("unix", path)
	require.NoError(t, err)
	g := grpc.NewServer()
	if s != nil {
		ctlv1.RegisterControlServer(g, s)
	}
	go func() { _ = g.Serve(l) }()
	t.Cleanup(g.Stop)
	return path
}

// call runs the command and returns what it printed, and its exit status.
func call(t *testing.T, address string, args ...string) (stdout, stderr string, code int) {
	t.Helper()
	var out, errs bytes.Buffer
	code = run(t.Context(), append([]string{"cloudhvctl", "--address", address}, args...), &out, &errs)
	return out.String(), errs.String(), code
}

// a pod whose name, cause and phases are hostile, one that has ended, and the pool's.
func someVMs() *ctlv1.ListResponse {
	return &ctlv1.ListResponse{Vms: []*ctlv1.VM{
		{
			Id: "0123456789ab", State: "ready", Outcome: "hit", Vcpus: 2, MemoryBytes: 512 << 20, VmmPid: 42, ShimPid: 43,
			VmmPssBytes: 150 << 20, ShimPssBytes: 12 << 20, Created: timestamppb.New(time.Now().Add(-3 * time.Hour)), Snapshot: "abc",
			Pod:    &ctlv1.Pod{Id: strings.Repeat("f", 64), ContainerdNamespace: "k8s.io", Namespace: "shop", Name: "web\x1b[2J\nx", Uid: "u"},
			Phases: []*ctlv1.Phase{{Name: "acquire", Took: durationpb.New(41 * time.Millisecond)}, {Name: "guest: \u202eevil", At: durationpb.New(50 * time.Millisecond), Took: durationpb.New(7500 * time.Microsecond)}},
		},
		{State: "stopped", Pod: &ctlv1.Pod{Id: "gone"}, Cause: "stopped"},
		{Id: "ba9876543210", State: "pooled", Vcpus: 1, MemoryBytes: 512 << 20, VmmPid: 44, VmmPssBytes: 100 << 20},
	}}
}

func TestVMs(t *testing.T) {
	t.Parallel()
	path := serve(t, &server{vms: someVMs()})
	out, _, code := call(t, path, "vms")
	require.Zero(t, code)
	want := []string{
		"VM            POD            NAME               STATE   CAME BY  VCPUS  MEMORY   PSS      SHIM    AGE  START    PID",
		`0123456789ab  fffffffffffff  shop/web\x1b[2J x  ready   hit      2      512 MiB  150 MiB  12 MiB  3h   57.5 ms  42`,
		"ba9876543210  -              -                  pooled  -        1      512 MiB  100 MiB  -       -    -        44",
	}
	assert.Equal(t, want, strings.Split(strings.TrimSpace(out), "\n"))
	out, _, _ = call(t, path, "vms", "--all", "--phases")
	assert.Contains(t, out, "\n-             gone ")
	assert.Regexp(t, `(?m)^guest: \\u202eevil +50.0 ms  7.5 ms$`, out)

	out, _, code = call(t, path, "-o", "json", "vms")
	require.Zero(t, code)
	var list []map[string]any
	require.NoError(t, json.Unmarshal([]byte(out), &list))
	require.Len(t, list, 2)
	assert.InDelta(t, 150<<20, list[0]["vmm_pss_bytes"], 0)
	assert.Equal(t, "web\x1b[2J\nx", list[0]["pod"].(map[string]any)["name"])
	assert.Nil(t, list[1]["pod"])
	assert.NotContains(t, out, "\x1b")
}

func TestStatus(t *testing.T) {
	t.Parallel()
	s := &server{status: &ctlv1.StatusResponse{
		Fit: true, Version: "v2+cloudhv.1",
		Hypervisor: &ctlv1.Hypervisor{Name: "qemu", Version: "7.2", Binary: "/usr/bin/q", Reason: "vmm is auto", Accelerator: "tcg", AcceleratorReason: "no KVM", Confinement: "users", OverheadBytes: 192 << 20},
		Pool: &ctlv1.Pool{
			On: true, Ready: 1, Making: 1, Target: 2, Max: 8, MemoryBytes: 192 << 20, MaxMemoryBytes: 1 << 30, Usable: true, Hits: 5, Misses: 1, Failures: 2,
			Pause: durationpb.New(1500 * time.Millisecond), LastError: "it\nfailed\x07",
		},
		Snapshots: []*ctlv1.Snapshot{{Id: "abc-1", Created: timestamppb.New(time.Now().Add(-90 * time.Second)), Bytes: 300 << 20, Users: 2, Current: true}, {Id: "abc", Bytes: 1, Damaged: true}},
		Vms:       map[string]uint32{"ready": 1},
	}}
	path := serve(t, s)
	out, _, code := call(t, path, "status")
	require.Zero(t, code)
	assert.Equal(t, `node         can serve
containerd   v2+cloudhv.1
hypervisor   qemu 7.2, /usr/bin/q
             because vmm is auto
accelerator  tcg
             because no KVM
confinement  users
overhead     192 MiB a pod, for the RuntimeClass
pool         on
ready        1 of 2 wanted, 8 at most; 1 being made
memory       192 MiB of 1 GiB
pods         hit 5, miss 1, cold 0, failed 0 since containerd started
last error   it failed\x07
             failures in a row: 2; next attempt in 1.5s

SNAPSHOT  SIZE     AGE  USERS  STATE
abc-1     300 MiB  90s  2      current
abc       1 B      -    0      damaged
`, out)
	out, _, code = call(t, path, "status", "-o", "json")
	require.Zero(t, code)
	var view statusView
	d := json.NewDecoder(strings.NewReader(out))
	d.DisallowUnknownFields()
	require.NoError(t, d.Decode(&view))
	assert.Equal(t, viewStatus(s.status), view)

	s.status = &ctlv1.StatusResponse{Version: "v2", Reasons: []string{"a", "b"}, Pool: &ctlv1.Pool{OffReason: "the node cannot serve"}}
	out, errs, code := call(t, path, "status")
	assert.Equal(t, exitUnfit, code)
	assert.Contains(t, out, "node        CANNOT SERVE, because\n            a\n            b\n")
	assert.Contains(t, out, "pool        off: the node cannot serve\n")
	assert.Contains(t, errs, "mend what is listed")
	out, _, code = call(t, path, "-o", "json", "status")
	assert.Equal(t, exitUnfit, code)
	assert.True(t, json.Valid([]byte(out)))
}

func TestTending(t *testing.T) {
	t.Parallel()
	s := &server{}
	path := serve(t, s)
	for _, c := range []struct{ args, text, json string }{
		{"drain", "drained: 3 ended", `{"ended":3}`},
		{"fill", "filled: 4 ready", `{"ready":4}`},
		{"fill 7", "filled: 4 ready", `{"ready":4}`},
		{"rebuild", "rebuilt: snapshot abc-1, 5 MiB", `{"snapshot":{"id":"abc-1","created":null,"bytes":5242880,"users":0,"current":true,"damaged":false}}`},
	} {
		out, _, code := call(t, path, strings.Fields(c.args)...)
		assert.Zero(t, code)
		assert.Contains(t, out, c.text)
		out, _, code = call(t, path, append([]string{"-o", "json"}, strings.Fields(c.args)...)...)
		assert.Zero(t, code)
		assert.JSONEq(t, c.json, out)
	}
	assert.Equal(t, []uint32{0, 0, 7, 7}, s.filled)
}

func TestConsole(t *testing.T) {
	t.Parallel()
	path := serve(t, &server{console: []string{"[ 0.0] hi\r", "\nWorld \xe2\x82", "\xac \x1b]0;owned\x07\x00\x9b31m\xff", "\u202eend"}})
	const want = "[ 0.0] hi\nWorld € \\x1b]0;owned\\x07\\x00\\x9b31m\\xff\\u202eend\n"
	out, _, code := call(t, path, "console", "pod")
	require.Zero(t, code)
	assert.Equal(t, want, out)
	out, _, code = call(t, path, "console", "--raw", "pod")
	require.Zero(t, code)
	assert.Contains(t, out, "\x1b]0;owned\x07")
	out, _, code = call(t, path, "-o", "json", "console", "pod")
	require.Zero(t, code)
	var view consoleView
	require.NoError(t, json.Unmarshal([]byte(out), &view))
	assert.Equal(t, consoleView{VM: "vm-of-pod", Pod: "pod", Console: want}, view)
}

// FuzzCleaner feeds it a console in two parts: it is the same as in one, and harmless.
func FuzzCleaner(f *testing.F) {
	f.Add([]byte("a\r\nb\x1b[0m\xe2\x82\xac\xff"), 7)
	f.Fuzz(func(t *testing.T, data []byte, cut int) {
		cut = min(max(cut, 0), len(data))
		var whole, parts bytes.Buffer
		for out, list := range map[*bytes.Buffer][][]byte{&whole: {data}, &parts: {data[:cut], data[cut:]}} {
			c := &cleaner{w: out}
			for _, p := range list {
				n, err := c.Write(p)
				require.NoError(t, err)
				require.Len(t, p, n)
			}
			require.NoError(t, c.Close())
		}
		require.Equal(t, whole.String(), parts.String())
		require.True(t, utf8.Valid(whole.Bytes()))
		for _, r := range whole.String() {
			require.True(t, r == '\n' || r == '\t' || unicode.IsPrint(r), "%q", r)
		}
	})
}

// Each way to fail says what to do, and has an exit status of its own.
func TestFailures(t *testing.T) {
	t.Parallel()
	dir, err := os.MkdirTemp("", "ctl")
	require.NoError(t, err)
	t.Cleanup(func() { require.NoError(t, os.RemoveAll(dir)) })
	l, err := net.ListenUnix("unix", &net.UnixAddr{Name: filepath.Join(dir, "dead")})
	require.NoError(t, err)
	l.SetUnlinkOnClose(false)
	require.NoError(t, l.Close())
	failing := func(err error) string { return serve(t, &server{err: fmt.Errorf("because: %w", err)}) }
	for name, c := range map[string]struct {
		address, args, say string
		code               int
	}{
		"no socket":           {filepath.Join(dir, "none"), "status", "is containerd running", exitUnreachable},
		"nobody listens":      {filepath.Join(dir, "dead"), "status", "systemctl start containerd", exitUnreachable},
		"no such service":     {serve(t, nil), "status", "has no cloudhv", exitNoPlugin},
		"no such service too": {serve(t, nil), "console x", "has no cloudhv", exitNoPlugin},
		"the pool is off":     {failing(errdefs.ErrFailedPrecondition), "drain", "cloudhvctl status", exitUnfit},
		"no such VM":          {failing(errdefs.ErrNotFound), "console x", "cloudhvctl vms", exitNoVM},
		"several VMs":         {failing(errdefs.ErrFailedPrecondition), "console x", "cloudhvctl vms", exitNoVM},
		"too many":            {failing(errdefs.ErrInvalidArgument), "fill 9", "because", exitUsage},
		"it cannot be filled": {failing(errdefs.ErrUnavailable), "fill", "goes on trying", exitFailed},
		"anything else":       {failing(errdefs.ErrInternal), "rebuild", "because", exitFailed},
		"time was up":         {serve(t, &server{stuck: true}), "-t 50ms drain", "goes on with it", exitTimeout},
		"an unknown command":  {dir, "nix", `no command "nix"`, exitUsage},
		"an unknown flag":     {dir, "vms --nix", "nix", exitUsage},
		"an unknown format":   {dir, "-o yaml vms", "text or json", exitUsage},
		"no time":             {dir, "-t 0s vms", "more than 0", exitUsage},
		"no VM":               {dir, "console", "name a VM", exitUsage},
		"too many arguments":  {dir, "status x", "too many", exitUsage},
		"fill 0":              {serve(t, &server{}), "fill 0", "at least 1", exitUsage},
		"fill -1":             {serve(t, &server{}), "fill -1", "at least 1", exitUsage},
		"a tail below 0":      {serve(t, &server{}), "console --tail=-1 x", "at least 0", exitUsage},
	} {
		out, errs, code := call(t, c.address, strings.Fields(c.args)...)
		assert.Equal(t, c.code, code, name)
		assert.Contains(t, errs, c.say, name)
		assert.Empty(t, out, name)
		assert.Equal(t, 1, strings.Count(errs, "\n"), name)
	}
	text, code := explain(&dialError{address: "/s", err: os.ErrPermission})
	assert.Contains(t, text, "sudo")
	assert.Equal(t, exitUnreachable, code)
}

func TestAge(t *testing.T) {
	t.Parallel()
	for d, want := range map[time.Duration]string{
		-time.Hour: "0s", 5 * time.Second: "5s", 119 * time.Second: "119s", 3 * time.Minute: "3m", 119 * time.Minute: "119m", 47 * time.Hour: "47h", 100 * time.Hour: "4d",
	} {
		at := time.Now().Add(-d)
		assert.Equal(t, want, age(&at))
	}
	assert.Equal(t, "1.5 KiB", size(1536))
}

// A shell can ask for completions.
func TestCompletion(t *testing.T) {
	t.Parallel()
	out, _, code := call(t, "/none", "completion", "bash")
	require.Zero(t, code)
	assert.Contains(t, out, "cloudhvctl")
}
