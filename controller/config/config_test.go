// SPDX-License-Identifier: Apache-2.0
// Copyright The containerd-cloudhv Authors

package config

import (
	"flag"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	"github.com/pelletier/go-toml/v2"
	"github.com/stretchr/testify/require"

	"github.com/cloudhv/containerd-cloudhv/vmpool/confine"
)

var update = flag.Bool("update", false, "rewrite the golden file")

// testHost is what open values are filled from in these tests.
var testHost = HostInfo{
	VCPUs: 4, Memory: 8<<30 + 12345, Users: confine.Database{Passwd: "testdata/passwd", SubUID: "testdata/subuid"},
}

// valid is a configuration whose files exist.
func valid(t *testing.T) *Config {
	t.Helper()
	dir := t.TempDir()
	c := Default()
	for name, to := range map[string]*Value{"vmlinux": &c.Kernel, "rootfs.erofs": &c.Image} {
		path := filepath.Join(dir, name)
		require.NoError(t, os.WriteFile(path, []byte("x"), 0o644))
		*to = path
	}
	return c
}

func TestDefaultIsGolden(t *testing.T) {
	t.Parallel()
	got, err := toml.Marshal(Default())
	require.NoError(t, err)
	path := filepath.Join("testdata", "default.toml")
	if *update {
		require.NoError(t, os.WriteFile(path, got, 0o644))
	}
	want, err := os.ReadFile(path)
	require.NoError(t, err)
	require.Equal(t, string(want), string(got), "run go test ./controller/config -update if this is meant")
}

func TestDefaultIsValid(t *testing.T) {
	t.Parallel()
	s, err := valid(t).Validate(testHost)
	require.NoError(t, err)
	require.Equal(t, 4, s.MaxVCPUs)
	require.Equal(t, 4, s.DefaultVCPUs)
	require.Equal(t, int64(8<<30), s.MaxMemory, "the host's memory, rounded down")
	require.Equal(t, int64(512<<20), s.DefaultMemory)
	require.Equal(t, int64(10<<30), s.ScratchSize)
	require.Equal(t, 5*time.Second, s.PowerOffTimeout)
	require.Equal(t, "/run/cloudhv", s.StateDir)
}

// Without a number of vCPUs a pod has the host's, within what is allowed.
func TestDefaultVCPUs(t *testing.T) {
	t.Parallel()
	for _, tc := range []struct{ host, most, want int }{{4, 0, 4}, {4, 3, 3}, {4, 8, 4}, {200, 0, 64}} {
		c := valid(t)
		c.MaxVCPUs = tc.most
		s, err := c.Validate(HostInfo{VCPUs: tc.host, Memory: 8 << 30})
		require.NoError(t, err)
		require.Equal(t, tc.want, s.DefaultVCPUs, "%+v", tc)
		require.LessOrEqual(t, s.DefaultVCPUs, s.MaxVCPUs)
	}
}

func TestDefaultsAreOverriddenOneByOne(t *testing.T) {
	t.Parallel()
	c := Default()
	require.NoError(t, toml.Unmarshal([]byte("default_vcpus = 3\n[timeouts]\nboot = '5s'\n"), c))
	require.NoError(t, toml.Unmarshal([]byte("[rootfs_builder]\nparallel = 7\n"), c))
	s, err := c.Validate(testHost)
	require.Error(t, err, "there are no such files")
	require.Equal(t, 3, s.DefaultVCPUs)
	require.Equal(t, 5*time.Second, s.BootTimeout)
	require.Equal(t, 30*time.Second, s.AgentTimeout)
	require.Equal(t, 7, s.BuilderParallel)
	require.Equal(t, int64(1<<30), s.BuilderMemory)
}

func TestValidateNamesFieldValueAndRemedy(t *testing.T) {
	t.Parallel()
	for name, tc := range map[string]struct {
		change func(*Config)
		want   []string
	}{
		"unknown hypervisor":      {func(c *Config) { c.VMM = "xen" }, []string{`vmm = "xen"`, `"qemu"`}},
		"relative hypervisor":     {func(c *Config) { c.CloudHypervisorBinary = "cloud-hypervisor" }, []string{`cloud_hypervisor_binary = "cloud-hypervisor"`, "absolute path"}},
		"missing kernel":          {func(c *Config) { c.Kernel = "/nonexistent/vmlinux" }, []string{`kernel = "/nonexistent/vmlinux"`, "guest kernel", "no such file"}},
		"empty kernel path":       {func(c *Config) { c.Kernel = "" }, []string{`kernel = ""`, "absolute path"}},
		"kernel is a directory":   {func(c *Config) { c.Kernel = "/tmp" }, []string{`kernel = "/tmp"`, "no regular file"}},
		"missing image":           {func(c *Config) { c.Image = "/nonexistent/rootfs.erofs" }, []string{`image = "/nonexistent/rootfs.erofs"`}},
		"relative path":           {func(c *Config) { c.StateDir = "run/cloudhv" }, []string{`state_dir = "run/cloudhv"`, "absolute path"}},
		"path with a comma":       {func(c *Config) { c.CacheDir = "/var/lib/a,b" }, []string{`cache_dir = "/var/lib/a,b"`, "comma"}},
		"same directory":          {func(c *Config) { c.CacheDir = c.StateDir }, []string{"cache_dir", "another directory than state_dir"}},
		"cache in state_dir":      {func(c *Config) { c.CacheDir = "/run/cloudhv/cache" }, []string{`cache_dir = "/run/cloudhv/cache"`, `in state_dir = "/run/cloudhv"`}},
		"templates in state_dir":  {func(c *Config) { c.Pool = map[string]any{"template_dir": "/run/cloudhv/t"} }, []string{`pool.template_dir = "/run/cloudhv/t"`, "state_dir"}},
		"kernel in state_dir":     {func(c *Config) { c.StateDir = "/" }, []string{"kernel = ", "image = ", "cache_dir = ", `state_dir = "/"`}},
		"state_dir too long":      {func(c *Config) { c.StateDir = "/" + strings.Repeat("d", 40) }, []string{"state_dir", "41 bytes", "29"}},
		"no program":              {func(c *Config) { c.QEMUBinary = "/nonexistent/qemu" }, []string{`qemu_binary = "/nonexistent/qemu"`, "program"}},
		"no shim":                 {func(c *Config) { c.Shim = "" }, []string{`shim = ""`}},
		"relative shim":           {func(c *Config) { c.Shim = "bin/shim" }, []string{`shim = "bin/shim"`, "absolute path"}},
		"memory too small":        {func(c *Config) { c.BaseMemory = "16MiB" }, []string{`base_memory = "16MiB"`, `"64MiB"`}},
		"memory no multiple":      {func(c *Config) { c.DefaultMemory = "513MiB" }, []string{`default_memory = "513MiB"`, `multiple of "4MiB"`, `"516MiB"`}},
		"memory without unit":     {func(c *Config) { c.DefaultMemory = "512M" }, []string{`default_memory = "512M"`, `"512MiB"`}},
		"memory overflows":        {func(c *Config) { c.MaxMemory = "99999999999TiB" }, []string{"max_memory"}},
		"default above max":       {func(c *Config) { c.MaxMemory = "256MiB" }, []string{`default_memory = "512MiB"`, `max_memory = "256MiB"`}},
		"base above default":      {func(c *Config) { c.BaseMemory = "1GiB" }, []string{`base_memory = "1GiB"`, `default_memory = "512MiB"`}},
		"vcpus above max":         {func(c *Config) { c.DefaultVCPUs, c.MaxVCPUs = 3, 2 }, []string{`default_vcpus = "3"`, "max_vcpus = 2"}},
		"less than no vcpus":      {func(c *Config) { c.DefaultVCPUs = -1 }, []string{`default_vcpus = "-1"`, "from 0 to 64"}},
		"vcpus no number":         {func(c *Config) { c.DefaultVCPUs = 1.5 }, []string{"default_vcpus", "whole number"}},
		"budget below one disk":   {func(c *Config) { c.ScratchBudget = "1GiB" }, []string{`scratch_budget = "1GiB"`, `scratch_size = "10GiB"`}},
		"scratch too small":       {func(c *Config) { c.ScratchSize = "1MiB" }, []string{`scratch_size = "1MiB"`, `"64MiB"`}},
		"negative size":           {func(c *Config) { c.ImageCacheLimit = "-1" }, []string{`image_cache_limit = "-1"`}},
		"prebuild":                {func(c *Config) { c.Prebuild = "sometimes" }, []string{`prebuild = "sometimes"`, `"used", "always" or "never"`}},
		"console too small":       {func(c *Config) { c.ConsoleLogLimit = "1" }, []string{`console_log_limit = "1"`}},
		"duration without unit":   {func(c *Config) { c.Timeouts = map[string]any{"boot": "60"} }, []string{`timeouts.boot = "60"`, `"30s"`}},
		"clock":                   {func(c *Config) { c.ClockSync = "often" }, []string{`clock_sync = "often"`, `"30s"`}},
		"reserve of memory":       {func(c *Config) { c.Pool = map[string]any{"reserve_memory": "lots"} }, []string{`pool.reserve_memory = "lots"`}},
		"duration of nothing":     {func(c *Config) { c.Timeouts = Timeouts{PowerOff: "0s"} }, []string{`timeouts.power_off = "0s"`}},
		"kernel parameter":        {func(c *Config) { c.KernelParams = []string{"a\nb"} }, []string{"kernel_params"}},
		"first user":              {func(c *Config) { c.Confinement = map[string]any{"first_uid": 0} }, []string{`confinement.first_uid = "0"`, "from 1000"}},
		"too many users":          {func(c *Config) { c.Confinement = map[string]any{"first_uid": 2147483000} }, []string{`confinement.uids = "65536"`, "2147483646 is the last"}},
		"users of others":         {func(c *Config) { c.Confinement = map[string]any{"first_uid": 4000, "uids": 1000} }, []string{`confinement.first_uid = "4000"`, "has alice with the number 4999"}},
		"users of containers":     {func(c *Config) { c.Confinement = map[string]any{"first_uid": 150000} }, []string{`confinement.first_uid = "150000"`, "gives 100000 to 165535 to alice"}},
		"relative volumes":        {func(c *Config) { c.DirectVolumes = []string{"dev/sda"} }, []string{`direct_volumes = "dev/sda"`, "absolute path"}},
		"all volumes":             {func(c *Config) { c.DirectVolumes = []string{"*"} }, []string{`direct_volumes = "*"`, "absolute path"}},
		"volumes elsewhere":       {func(c *Config) { c.DirectVolumes = []string{"/dev/../etc"} }, []string{`direct_volumes = "/dev/../etc"`}},
		"foreign annotation":      {func(c *Config) { c.Annotations = []string{"*"} }, []string{`annotations = "*"`}},
		"builder's memory":        {func(c *Config) { c.RootFSBuilder = map[string]any{"memory": "1KiB"} }, []string{`rootfs_builder.memory = "1KiB"`}},
		"unknown time limit":      {func(c *Config) { c.Timeouts = map[string]any{"bot": "5s"} }, []string{`timeouts.bot = "5s"`, "no such option"}},
		"builder that is missing": {func(c *Config) { c.RootFSBuilder = map[string]any{"binary": "/nonexistent/mkfs"} }, []string{`rootfs_builder.binary`}},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			c := valid(t)
			tc.change(c)
			_, err := c.Validate(testHost)
			require.ErrorIs(t, err, errdefs.ErrInvalidArgument)
			for _, w := range tc.want {
				require.ErrorContains(t, err, w)
			}
		})
	}
}

func TestValidateReportsAllTogether(t *testing.T) {
	t.Parallel()
	c := Default()
	c.VMM, c.Kernel, c.DefaultMemory, c.StateDir, c.Timeouts = "xen", "/nonexistent", "1MiB", "rel", map[string]any{"boot": "soon"}
	s, err := c.Validate(testHost)
	var all *Error
	require.ErrorAs(t, err, &all)
	require.GreaterOrEqual(t, len(all.Problems), 5)
	for _, field := range []string{"vmm", "kernel", "image", "default_memory", "state_dir", "timeouts.boot"} {
		require.ErrorContains(t, err, field+" = ")
	}
	require.NotContains(t, err.Error(), "\n")
	require.NotNil(t, s)
	require.Equal(t, "/var/lib/cloudhv", s.CacheDir, "what is right can still be used")
}

func TestClockSync(t *testing.T) {
	t.Parallel()
	for value, want := range map[Value]time.Duration{"1m": time.Minute, "0": 0, 0: 0, "500ms": 500 * time.Millisecond} {
		c := valid(t)
		c.ClockSync = value
		s, err := c.Validate(testHost)
		require.NoError(t, err)
		require.Equal(t, want, s.ClockSync)
	}
}

func TestReserveOfMemory(t *testing.T) {
	t.Parallel()
	for value, want := range map[Value]int64{"0": testHost.Memory / 20, "1GiB": 1 << 30} {
		c := valid(t)
		c.Pool = map[string]any{"reserve_memory": value}
		s, err := c.Validate(testHost)
		require.NoError(t, err)
		require.Equal(t, want, s.Pool.ReserveMemory)
	}
}

func TestSizes(t *testing.T) {
	t.Parallel()
	for text, want := range map[string]int64{
		"0": 0, "1": 1, "512B": 512, "4KiB": 4096, "512MiB": 512 << 20, "1 GiB": 1 << 30, "2TiB": 2 << 40,
	} {
		n, err := ParseSize(text)
		require.NoError(t, err, text)
		require.Equal(t, want, n, text)
		back, err := ParseSize(FormatSize(n))
		require.NoError(t, err)
		require.Equal(t, n, back)
	}
	for _, text := range []string{"", "MiB", "-1MiB", "1MB", "1.5GiB", "0x10", "9223372036854775808", "9999999TiB"} {
		_, err := ParseSize(text)
		require.ErrorIs(t, err, errdefs.ErrInvalidArgument, text)
	}
	require.Equal(t, int64(Granule), RoundUp(1))
	require.Equal(t, int64(0), RoundUp(0))
	require.Equal(t, int64(2*Granule), RoundUp(Granule+1))
}
