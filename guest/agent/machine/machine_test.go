// SPDX-License-Identifier: Apache-2.0
// Copyright The containerd-cloudhv Authors

package machine

import (
	"context"
	"encoding/hex"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	"github.com/stretchr/testify/require"
	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/cloudhv/containerd-cloudhv/guest/api"
	guestv1 "github.com/cloudhv/containerd-cloudhv/guest/api/v1"
)

func request() *guestv1.ConfigureRequest {
	return &guestv1.ConfigureRequest{
		PodId: "pod", Hostname: "web-0", Clock: timestamppb.Now(), Entropy: make([]byte, 32),
		Vcpus: 1, MachineId: strings.Repeat("a0", 16),
	}
}

func TestValidate(t *testing.T) {
	t.Parallel()
	require.NoError(t, validate(request()))
	for _, tc := range []struct {
		field  string
		change func(*guestv1.ConfigureRequest)
	}{
		{"pod_id", func(r *guestv1.ConfigureRequest) { r.PodId = "" }},
		{"hostname", func(r *guestv1.ConfigureRequest) { r.Hostname = "a/b" }},
		{"hostname", func(r *guestv1.ConfigureRequest) { r.Hostname = strings.Repeat("x", 65) }},
		{"clock", func(r *guestv1.ConfigureRequest) { r.Clock = nil }},
		{"clock", func(r *guestv1.ConfigureRequest) { r.Clock = &timestamppb.Timestamp{Seconds: 1, Nanos: -1} }},
		{"entropy", func(r *guestv1.ConfigureRequest) { r.Entropy = r.GetEntropy()[:31] }},
		{"entropy", func(r *guestv1.ConfigureRequest) { r.Entropy = make([]byte, 513) }},
		{"vcpus", func(r *guestv1.ConfigureRequest) { r.Vcpus = 0 }},
		{"machine_id", func(r *guestv1.ConfigureRequest) { r.MachineId = strings.Repeat("A0", 16) }},
		{"machine_id", func(r *guestv1.ConfigureRequest) { r.MachineId = "../../etc" }},
		{"sysctl", func(r *guestv1.ConfigureRequest) { r.Sysctls = map[string]string{"kernel.core_pattern": "|/x"} }},
		{"resolv_conf", func(r *guestv1.ConfigureRequest) { r.ResolvConf = make([]byte, maxTextFile+1) }},
	} {
		r := request()
		tc.change(r)
		err := validate(r)
		require.True(t, errdefs.IsInvalidArgument(err), "%s: %v", tc.field, err)
		require.ErrorContains(t, err, tc.field)
	}
	// All that is wrong is told at once.
	err := validate(&guestv1.ConfigureRequest{})
	for _, f := range []string{"pod_id", "hostname", "clock", "entropy", "vcpus", "machine_id"} {
		require.ErrorContains(t, err, f)
	}
}

func TestSysctlPath(t *testing.T) {
	t.Parallel()
	for name, want := range map[string]string{
		"net.ipv4.ping_group_range":          "net/ipv4/ping_group_range",
		"net/ipv4/conf/eth0.1/forwarding":    "net/ipv4/conf/eth0.1/forwarding",
		"kernel.shm_rmid_forced":             "kernel/shm_rmid_forced",
		"fs.mqueue.msg_max":                  "fs/mqueue/msg_max",
		"net.ipv4.conf.all.route_localnet":   "net/ipv4/conf/all/route_localnet",
		"":                                   "",
		"kernel.core_pattern":                "",
		"vm.overcommit_memory":               "",
		"net":                                "",
		"net..ipv4":                          "",
		"net/../kernel/core_pattern":         "",
		"net/ipv4/../../kernel/core_pattern": "",
		"/proc/sys/net":                      "",
		"net.ipv4.a/b":                       "",
		"net.ipv4.a b":                       "",
		"net.ipv4.\x00":                      "",
		strings.Repeat("net.", 100):          "",
	} {
		got, err := api.SysctlPath(name)
		if want == "" {
			require.True(t, errdefs.IsInvalidArgument(err), "%q: %q, %v", name, got, err)
			continue
		}
		require.NoError(t, err, name)
		require.Equal(t, want, got)
	}
}

func FuzzSysctlPath(f *testing.F) {
	f.Add("net.ipv4.ip_forward")
	f.Add("net/ipv4/conf/eth0.1/forwarding")
	f.Fuzz(func(t *testing.T, name string) {
		p, err := api.SysctlPath(name)
		if err == nil && (!filepath.IsLocal(p) || filepath.Clean(p) != p) {
			t.Fatalf("%q gives %q", name, p)
		}
	})
}

func TestSetSysctls(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	require.NoError(t, os.MkdirAll(filepath.Join(dir, "net/ipv4"), 0o755))
	file := filepath.Join(dir, "net/ipv4/x")
	require.NoError(t, os.WriteFile(file, nil, 0o644))
	require.NoError(t, setSysctls(dir, map[string]string{"net.ipv4.x": "1 2"}, nil))
	b, err := os.ReadFile(file)
	require.NoError(t, err)
	require.Equal(t, "1 2", string(b))
	err = setSysctls(dir, map[string]string{"net.ipv4.unknown": "1"}, nil)
	require.True(t, errdefs.IsInvalidArgument(err))
	require.ErrorContains(t, err, "net.ipv4.unknown")
}

func TestHosts(t *testing.T) {
	t.Parallel()
	r := request()
	r.Interfaces = []*guestv1.Interface{{Addresses: []string{"10.0.0.2/24", "fe80::1/64", "fd00::2/64"}}}
	got := string(makeHosts(r))
	require.True(t, strings.HasPrefix(got, "127.0.0.1\tlocalhost\n::1\tlocalhost "), got)
	require.True(t, strings.HasSuffix(got, "10.0.0.2\tweb-0\nfd00::2\tweb-0\n"), got)
}

func TestParseList(t *testing.T) {
	t.Parallel()
	for s, want := range map[string][]int{"": nil, "0": {0}, "0-2,5": {0, 1, 2, 5}, "1,3": {1, 3}} {
		got, err := parseList(s)
		require.NoError(t, err)
		require.Equal(t, want, got, s)
	}
	for _, s := range []string{"x", "2-1", "-1", "0-99999999", ","} {
		_, err := parseList(s)
		require.Error(t, err, s)
	}
}

func TestSetCPUs(t *testing.T) {
	t.Parallel()
	for _, tc := range []struct {
		online, present string
		n               int
		want            map[string]string // of files that are written
	}{
		{"0", "0-3", 1, nil},
		{"0", "0-3", 3, map[string]string{"cpu1": "1", "cpu2": "1"}},
		{"0-3", "0-3", 2, map[string]string{"cpu3": "0", "cpu2": "0"}},
		{"0,2", "0-3", 3, map[string]string{"cpu1": "1"}},
	} {
		c := cpus{dir: t.TempDir()}
		require.NoError(t, os.WriteFile(filepath.Join(c.dir, "online"), []byte(tc.online+"\n"), 0o644))
		require.NoError(t, os.WriteFile(filepath.Join(c.dir, "present"), []byte(tc.present+"\n"), 0o644))
		for _, i := range []string{"cpu1", "cpu2", "cpu3"} {
			require.NoError(t, os.Mkdir(filepath.Join(c.dir, i), 0o755))
			require.NoError(t, os.WriteFile(filepath.Join(c.dir, i, "online"), nil, 0o644))
		}
		require.NoError(t, c.set(t.Context(), tc.n))
		for _, i := range []string{"cpu1", "cpu2", "cpu3"} {
			b, err := os.ReadFile(filepath.Join(c.dir, i, "online"))
			require.NoError(t, err)
			require.Equal(t, tc.want[i], string(b), "%+v %s", tc, i)
		}
	}
}

func TestParseIomem(t *testing.T) {
	t.Parallel()
	got, err := parseIomem(strings.NewReader(`00000000-00000fff : Reserved
00001000-0009fbff : System RAM
00100000-07fdffff : System RAM
  01000000-01c00000 : Kernel code
100000000-17fffffff : System RAM (virtio_mem)
`))
	require.NoError(t, err)
	require.EqualValues(t, 128<<20, got)
	_, err = parseIomem(strings.NewReader("5-1 : System RAM\n"))
	require.Error(t, err)
}

func FuzzParse(f *testing.F) {
	f.Add("0-3,5")
	f.Add("00001000-0009fbff : System RAM")
	f.Fuzz(func(_ *testing.T, s string) {
		_, _ = parseList(s)
		_, _ = parseIomem(strings.NewReader(s))
	})
}

func TestMemoryWait(t *testing.T) {
	t.Parallel()
	const mib = 1 << 20
	var now atomic.Uint64
	m := &Memory{boot: 128 * mib, total: 110 * mib, now: now.Load}
	now.Store(110 * mib)
	require.EqualValues(t, 128*mib, m.plugged())
	require.NoError(t, m.Wait(t.Context(), 128*mib, configureLimit))

	// Growth that is on its way is waited for.
	time.AfterFunc(50*time.Millisecond, func() { now.Store(494 * mib) })
	require.NoError(t, m.Wait(t.Context(), 512*mib, configureLimit))

	// A shrinking that does not begin is not waited for.
	began := time.Now()
	require.NoError(t, m.Wait(t.Context(), 128*mib, configureLimit))
	require.Less(t, time.Since(began), configureLimit)

	// One that has begun is.
	time.AfterFunc(20*time.Millisecond, func() { now.Store(300 * mib) })
	time.AfterFunc(2*memoryStart, func() { now.Store(110 * mib) })
	require.NoError(t, m.Wait(t.Context(), 128*mib, configureLimit))
	require.EqualValues(t, 110*mib, now.Load())

	ctx, cancel := context.WithTimeout(t.Context(), 30*time.Millisecond)
	defer cancel()
	require.ErrorIs(t, m.Wait(ctx, 1<<40, configureLimit), context.DeadlineExceeded)
}

// A shrinking that the kernel would kill for is refused.
func TestCheckShrink(t *testing.T) {
	t.Parallel()
	const mib = 1 << 20
	available := uint64(500 * mib)
	m := &Memory{
		boot: 512 * mib, total: 490 * mib,
		now: func() uint64 { return 1002 * mib }, available: func() uint64 { return available },
	}
	require.NoError(t, m.CheckShrink(2048*mib), "a growth")
	require.NoError(t, m.CheckShrink(600*mib))
	require.ErrorIs(t, m.CheckShrink(512*mib), errdefs.ErrFailedPrecondition, "nothing would be left")
	available = 200 * mib
	require.ErrorIs(t, m.CheckShrink(600*mib), errdefs.ErrFailedPrecondition)
	require.NoError(t, m.CheckShrink(1000*mib))

	require.EqualValues(t, 2048<<10, parseAvailable("MemTotal:  9 kB\nMemAvailable:       2048 kB\nX: 1 kB\n"))
	require.Zero(t, parseAvailable("MemTotal: 9 kB\n"))
	require.Zero(t, parseAvailable("MemAvailable: lots kB\n"))
	require.Zero(t, parseAvailable("MemAvailable: 99999999999999999999 kB\n"))
}

func TestEntropyArg(t *testing.T) {
	t.Parallel()
	require.Equal(t, "18000000"+"03000000"+"010203", hex.EncodeToString(entropyArg([]byte{1, 2, 3})))
}

// brokenSystem fails, as a test must not change the machine.
type brokenSystem struct{ System }

var errBroken = errors.New("broken")

func (brokenSystem) SetClock(time.Time) error { return errBroken }

func TestConfigureFails(t *testing.T) {
	t.Parallel()
	s := New(Config{PodDir: t.TempDir(), System: brokenSystem{}})
	require.True(t, errdefs.IsFailedPrecondition(s.Configured()))
	_, err := s.Configure(t.Context(), request())
	require.ErrorIs(t, err, errBroken)
	// After that the VM is of no use, and says why.
	_, err = s.Configure(t.Context(), request())
	require.True(t, errdefs.IsFailedPrecondition(err), "%v", err)
	require.ErrorContains(t, err, "broken")
	info, err := s.Info(t.Context(), &guestv1.InfoRequest{})
	require.NoError(t, err)
	require.False(t, info.GetConfigured())
	require.NotZero(t, info.GetMemoryTotalBytes())
}

func TestConfiguredTwice(t *testing.T) {
	t.Parallel()
	s := New(Config{})
	s.request, s.steps = request(), []*guestv1.Step{{Name: "clock"}}
	s.state.configured = true
	again := request()
	again.Clock, again.Entropy = timestamppb.New(time.Unix(1, 0)), []byte(strings.Repeat("x", 64))
	resp, err := s.Configure(t.Context(), again)
	require.NoError(t, err)
	require.Len(t, resp.GetSteps(), 1)
	again.Hostname = "other"
	_, err = s.Configure(t.Context(), again)
	require.True(t, errdefs.IsAlreadyExists(err), "%v", err)
}
