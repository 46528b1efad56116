// SPDX-License-Identifier: Apache-2.0
// Copyright The containerd-cloudhv Authors

package config

import (
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"runtime"
	"slices"
	"strings"
	"time"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"

	"github.com/cloudhv/containerd-cloudhv/vmpool/confine"
	"github.com/cloudhv/containerd-cloudhv/vmpool/vmm"
)

// Granule is what sizes of memory are multiples of, in bytes. It is twice
// vmm.MemoryUnit: a guest's virtio-mem driver plugs whole page blocks, which
// are as large without huge pages in its kernel.
const Granule = 4 << 20

const (
	// minBaseMemory is about what a guest needs to boot.
	minBaseMemory = max(64<<20, vmm.MinMemory)
	minScratch    = 64 << 20
	minConsole    = vmm.MinConsoleLimit
	minBuilder    = 64 << 20
	// maxSandboxID and maxSocketPath bound the state directory's length: a
	// sandbox's sockets lie two levels below it.
	maxSandboxID  = 64
	maxSocketPath = 107
	maxVCPUs      = vmm.MaxVCPUs

	maxBootParallel    = 1024
	maxBuilderParallel = 64

	maxPool = 1000

	minTimeout = 100 * time.Millisecond
	maxTimeout = 24 * time.Hour
)

// MaxStateDirLen is the longest state_dir, in bytes.
const MaxStateDirLen = maxSocketPath - (1 + maxSandboxID + 1 + vmm.MaxDirName)

// Settings is a checked Config: units parsed, what is left open filled in from
// the host. Sizes are in bytes.
type Settings struct {
	VMM        string
	QEMUBinary string
	// CloudHypervisorBinary may be a path at which there is nothing.
	CloudHypervisorBinary string
	Kernel                string
	Image                 string
	KernelParams          []string

	DefaultVCPUs, MaxVCPUs     int
	DefaultMemory, MaxMemory   int64
	BaseMemory, MemoryOverhead int64
	// BootParallel is 0 where the accelerator decides.
	BootParallel int

	StateDir, CacheDir, Shim string
	ScratchSize              int64
	// ScratchBudget is 0 for none.
	ScratchBudget   int64
	ImageCacheLimit int64
	Prebuild        string
	ConsoleLogLimit int64
	// ClockSync is 0 for never.
	ClockSync         time.Duration
	Cgroup            bool
	CgroupParent      string
	Annotations       []string
	DirectVolumes     []string
	UnprivilegedPorts bool
	UnprivilegedICMP  bool
	Debug             bool

	BuilderBinary    string
	BuilderMemory    int64
	BuilderImageSize int64
	BuilderParallel  int

	Pool PoolSettings
	// Confine runs VMMs as users of VMMUsers.
	Confine  bool
	VMMUsers confine.Range

	BootTimeout, AgentTimeout, HotPlugTimeout, PowerOffTimeout time.Duration
	CleanupTimeout, RootFSTimeout, RecoverTimeout              time.Duration
}

// PoolSettings are the checked section pool.
type PoolSettings struct {
	Restore         bool
	Min, Max        int
	MaxMemory       int64
	ReserveMemory   int64
	Parallel        int
	WarmUp          string
	Horizon, Window time.Duration
	TemplateDir     string
}

// HostInfo is what Validate fills open values from.
type HostInfo struct {
	VCPUs  int
	Memory int64
	// Users are those that there are.
	Users confine.Database
}

// ReadHostInfo reads it from this host.
func ReadHostInfo() HostInfo {
	info := HostInfo{VCPUs: runtime.NumCPU(), Memory: 1 << 30, Users: confine.HostDatabase}
	var si unix.Sysinfo_t
	if err := unix.Sysinfo(&si); err == nil {
		info.Memory = int64(si.Totalram) * int64(si.Unit)
	}
	return info
}

// Validate checks everything and reports all that is wrong together: each
// error names the field, its value and what would be right, and the whole
// wraps ErrInvalidArgument. The Settings are returned also with an error, as
// far as they could be made, so that what was started under an earlier
// configuration can still be cleaned up.
func (c *Config) Validate(host HostInfo) (*Settings, error) {
	v := &validator{}
	s := &Settings{
		VMM:               v.vmm(c.VMM),
		Cgroup:            v.flag("cgroup", c.Cgroup),
		CgroupParent:      v.cgroup("cgroup_parent", c.CgroupParent),
		UnprivilegedPorts: v.flag("enable_unprivileged_ports", c.EnableUnprivilegedPorts),
		UnprivilegedICMP:  v.flag("enable_unprivileged_icmp", c.EnableUnprivilegedICMP),
		Debug:             v.flag("debug", c.Debug),
		Annotations:       v.annotations(c.Annotations),
		DirectVolumes:     v.directVolumes(c.DirectVolumes),
	}
	v.guest(c, s)
	v.sizes(c, s, host)
	v.directories(c, s)
	v.limits(c, s)
	v.builder(section(v, "rootfs_builder", c.RootFSBuilder, defaultBuilder()), s)
	v.pool(section(v, "pool", c.Pool, defaultPool()), s, host)
	v.confinement(section(v, "confinement", c.Confinement, defaultConfinement()), s, host)
	v.timeouts(section(v, "timeouts", c.Timeouts, defaultTimeouts()), s)
	v.apart(s)
	if len(v.errs) > 0 {
		return s, &Error{Problems: v.errs}
	}
	return s, nil
}

// Error holds all that is wrong with a configuration. It is an
// ErrInvalidArgument.
type Error struct {
	Problems []error
}

func (e *Error) Error() string {
	texts := make([]string, 0, len(e.Problems))
	for _, p := range e.Problems {
		texts = append(texts, p.Error())
	}
	return strings.Join(texts, "; ")
}

// Unwrap gives the problems and the class of them all.
func (e *Error) Unwrap() []error {
	return append(slices.Clone(e.Problems), errdefs.ErrInvalidArgument)
}

type validator struct {
	errs []error
}

func (v *validator) errorf(field string, value any, format string, args ...any) {
	v.errs = append(v.errs, fmt.Errorf("%s = %q: %s", field, fmt.Sprint(value), fmt.Sprintf(format, args...)))
}

func (v *validator) vmm(value Value) string {
	name, ok := v.text("vmm", value)
	switch name {
	case VMMAuto, VMMQEMU, VMMCloudHypervisor:
	default:
		if ok {
			v.errorf("vmm", name, "no such hypervisor; use %q, %q or %q", VMMAuto, VMMQEMU, VMMCloudHypervisor)
		}
	}
	return name
}

func (v *validator) guest(c *Config, s *Settings) {
	s.Kernel = v.file("kernel", c.Kernel, "the guest kernel (vmlinux)")
	s.Image = v.file("image", c.Image, "the guest's root file system (rootfs.erofs)")
	s.QEMUBinary = v.optionalProgram("qemu_binary", c.QEMUBinary)
	if c.CloudHypervisorBinary != "" {
		s.CloudHypervisorBinary = v.path("cloud_hypervisor_binary", c.CloudHypervisorBinary)
	}
	for _, p := range v.texts("kernel_params", c.KernelParams) {
		if p == "" || strings.ContainsFunc(p, func(r rune) bool { return r < ' ' || r == 0x7f }) {
			v.errorf("kernel_params", p, "a kernel parameter is a word without control characters")
			continue
		}
		s.KernelParams = append(s.KernelParams, p)
	}
	shim, ok := v.text("shim", c.Shim)
	switch {
	case ok && shim == "":
		v.errorf("shim", c.Shim, "name the shim's program, such as containerd-shim-cloudhv-v1")
	case strings.Contains(shim, "/"):
		shim = v.program("shim", c.Shim)
	}
	s.Shim = shim
}

func (v *validator) sizes(c *Config, s *Settings, host HostInfo) {
	wrong := len(v.errs)
	s.DefaultVCPUs = v.count("default_vcpus", c.DefaultVCPUs, 0, maxVCPUs)
	s.MaxVCPUs = v.count("max_vcpus", c.MaxVCPUs, 0, maxVCPUs)
	if s.MaxVCPUs == 0 {
		s.MaxVCPUs = min(max(host.VCPUs, s.DefaultVCPUs), maxVCPUs)
	}
	if s.DefaultVCPUs == 0 {
		s.DefaultVCPUs = min(host.VCPUs, s.MaxVCPUs)
	}
	// What is wrong by itself is not compared.
	if len(v.errs) == wrong && s.DefaultVCPUs > s.MaxVCPUs {
		v.errorf("default_vcpus", c.DefaultVCPUs, "is more than max_vcpus = %d", s.MaxVCPUs)
	}
	wrong = len(v.errs)
	s.BaseMemory = v.memory("base_memory", c.BaseMemory, minBaseMemory)
	s.DefaultMemory = v.memory("default_memory", c.DefaultMemory, minBaseMemory)
	s.MemoryOverhead = v.memory("memory_overhead", c.MemoryOverhead, 0)
	s.MaxMemory = v.memory("max_memory", c.MaxMemory, 0)
	if s.MaxMemory == 0 {
		s.MaxMemory = host.Memory / Granule * Granule
	}
	if len(v.errs) > wrong {
		return
	}
	if s.BaseMemory > s.DefaultMemory {
		v.errorf("base_memory", c.BaseMemory, "is more than default_memory = %q", FormatSize(s.DefaultMemory))
	}
	if s.DefaultMemory > s.MaxMemory {
		v.errorf("default_memory", c.DefaultMemory, "is more than max_memory = %q", FormatSize(s.MaxMemory))
	}
}

func (v *validator) directories(c *Config, s *Settings) {
	s.StateDir = v.path("state_dir", c.StateDir)
	if len(s.StateDir) > MaxStateDirLen {
		v.errorf("state_dir", c.StateDir, "is %d bytes long; with more than %d the sockets' paths exceed what the kernel takes",
			len(s.StateDir), MaxStateDirLen)
	}
	s.CacheDir = v.path("cache_dir", c.CacheDir)
	if s.StateDir != "" && s.StateDir == s.CacheDir {
		v.errorf("cache_dir", c.CacheDir, "must be another directory than state_dir")
	}
}

// apart keeps everything else out of state_dir, all of whose directories are sandboxes'.
func (v *validator) apart(s *Settings) {
	for _, f := range []struct{ field, path string }{
		{"cache_dir", s.CacheDir}, {"kernel", s.Kernel}, {"image", s.Image}, {"pool.template_dir", s.Pool.TemplateDir},
	} {
		// Templates that are in cache_dir are told with it.
		byDefault := f.field != "cache_dir" && s.CacheDir != "" && strings.HasPrefix(f.path, s.CacheDir+"/")
		if s.StateDir != "" && !byDefault && strings.HasPrefix(f.path, strings.TrimSuffix(s.StateDir, "/")+"/") {
			v.errorf(f.field, f.path, "must not be in state_dir = %q", s.StateDir)
		}
	}
}

func (v *validator) limits(c *Config, s *Settings) {
	s.ScratchSize = v.atLeast("scratch_size", c.ScratchSize, minScratch)
	s.ScratchBudget = v.atLeast("scratch_budget", c.ScratchBudget, 0)
	if s.ScratchBudget > 0 && s.ScratchBudget < s.ScratchSize {
		v.errorf("scratch_budget", c.ScratchBudget, "must be 0 or at least scratch_size = %q", FormatSize(s.ScratchSize))
	}
	s.ImageCacheLimit = v.atLeast("image_cache_limit", c.ImageCacheLimit, 0)
	s.Prebuild = v.oneOf("prebuild", c.Prebuild, PrebuildUsed, PrebuildAlways, PrebuildNever)
	s.ConsoleLogLimit = v.atLeast("console_log_limit", c.ConsoleLogLimit, minConsole)
	s.ClockSync = v.durationOrNever("clock_sync", c.ClockSync)
	s.BootParallel = v.count("boot_parallel", c.BootParallel, 0, maxBootParallel)
}

func (v *validator) builder(b RootFSBuilder, s *Settings) {
	s.BuilderBinary = v.optionalProgram("rootfs_builder.binary", b.Binary)
	s.BuilderMemory = v.atLeast("rootfs_builder.memory", b.Memory, minBuilder)
	s.BuilderImageSize = v.atLeast("rootfs_builder.image_size", b.ImageSize, minScratch)
	s.BuilderParallel = v.count("rootfs_builder.parallel", b.Parallel, 1, maxBuilderParallel)
}

func (v *validator) pool(p Pool, s *Settings, host HostInfo) {
	wrong := len(v.errs)
	out := &s.Pool
	out.Restore = v.flag("pool.restore", p.Restore)
	out.Min = v.count("pool.min", p.Min, 0, maxPool)
	out.Max = v.count("pool.max", p.Max, 0, maxPool)
	if len(v.errs) == wrong && out.Min > out.Max {
		v.errorf("pool.min", p.Min, "is more than pool.max = %d", out.Max)
	}
	out.MaxMemory = v.atLeast("pool.max_memory", p.MaxMemory, 0)
	if out.MaxMemory == 0 {
		out.MaxMemory = host.Memory / 10
	}
	out.ReserveMemory = v.atLeast("pool.reserve_memory", p.ReserveMemory, 0)
	if out.ReserveMemory == 0 {
		out.ReserveMemory = host.Memory / 20
	}
	out.Parallel = v.count("pool.parallel", p.Parallel, 0, maxBootParallel)
	out.WarmUp = v.oneOf("pool.warm_up", p.WarmUp, WarmUpAuto, WarmUpAlways, WarmUpNever)
	out.Horizon = v.duration("pool.memory", p.Memory)
	out.Window = v.duration("pool.window", p.Window)
	out.TemplateDir = filepath.Join(s.CacheDir, "templates")
	if p.TemplateDir != "" {
		out.TemplateDir = v.path("pool.template_dir", p.TemplateDir)
	}
}

func (v *validator) duration(field string, value Value) time.Duration {
	text, _ := value.(string)
	d, err := time.ParseDuration(text)
	if err != nil || d < minTimeout || d > maxTimeout {
		v.errorf(field, value, "use a duration from %s to %s, such as %q", minTimeout, maxTimeout, "30s")
		return 30 * time.Second
	}
	return d
}

// durationOrNever is 0 for "0".
func (v *validator) durationOrNever(field string, value Value) time.Duration {
	if text := fmt.Sprint(value); text == "0" {
		return 0
	}
	return v.duration(field, value)
}

func (v *validator) timeouts(t Timeouts, s *Settings) {
	for _, f := range []struct {
		name  string
		value Value
		to    *time.Duration
	}{
		{"boot", t.Boot, &s.BootTimeout},
		{"agent_call", t.AgentCall, &s.AgentTimeout},
		{"hot_plug", t.HotPlug, &s.HotPlugTimeout},
		{"power_off", t.PowerOff, &s.PowerOffTimeout},
		{"cleanup", t.Cleanup, &s.CleanupTimeout},
		{"rootfs_build", t.RootFSBuild, &s.RootFSTimeout},
		{"recover", t.Recover, &s.RecoverTimeout},
	} {
		*f.to = v.duration("timeouts."+f.name, f.value)
	}
}

// ownAnnotation is what an allow-list entry may begin with.
var ownAnnotation = regexp.MustCompile(`^io\.(cloudhv|katacontainers)\.[a-zA-Z0-9._-]*\*?$`)

func (v *validator) annotations(value Value) []string {
	patterns := v.texts("annotations", value)
	for _, p := range patterns {
		if !ownAnnotation.MatchString(p) {
			v.errorf("annotations", p, "an entry is a key under io.cloudhv. or io.katacontainers., or a prefix of one and *")
		}
	}
	return patterns
}

func (v *validator) directVolumes(value Value) []string {
	wrong := len(v.errs)
	paths := v.texts("direct_volumes", value)
	if len(v.errs) > wrong {
		return nil
	}
	for _, p := range paths {
		plain := strings.TrimSuffix(p, "*")
		if !filepath.IsAbs(plain) || strings.Contains(plain, "*") || strings.ContainsAny(p, "\x00\n") || strings.Contains(plain+"/", "/../") {
			v.errorf("direct_volumes", p, "an entry is an absolute path without .., or the beginning of one and *, such as %q", "/dev/nvme1n*")
		}
	}
	return paths
}

// cgroup checks the path of a group below the root of its hierarchy.
func (v *validator) cgroup(field string, value Value) string {
	clean := v.path(field, value)
	if clean == "/" {
		v.errorf(field, value, "must not be the root of all groups, but such as %q", "/cloudhv")
	}
	return clean
}

// path checks an absolute path, and cleans it.
func (v *validator) path(field string, value Value) string {
	p, ok := v.text(field, value)
	switch {
	case !ok:
		return ""
	case !filepath.IsAbs(p):
		v.errorf(field, p, "must be an absolute path")
		return ""
	case strings.ContainsAny(p, "\x00\n,"):
		v.errorf(field, p, "must not contain a comma, a newline or NUL")
		return ""
	}
	return filepath.Clean(p)
}

func (v *validator) file(field string, value Value, what string) string {
	clean := v.path(field, value)
	if clean == "" {
		return ""
	}
	st, err := os.Stat(clean)
	switch {
	case err != nil:
		v.errorf(field, value, "must be the path of %s: %v", what, err)
	case !st.Mode().IsRegular():
		v.errorf(field, value, "must be the path of %s, and is no regular file", what)
	case st.Size() == 0:
		v.errorf(field, value, "must be the path of %s, and is empty", what)
	}
	return clean
}

func (v *validator) program(field string, value Value) string {
	clean := v.path(field, value)
	if clean == "" {
		return ""
	}
	if err := unix.Access(clean, unix.X_OK); err != nil {
		v.errorf(field, value, "must be the path of a program: %v", err)
	}
	return clean
}

// optionalProgram is a program or, to have it looked for, empty.
func (v *validator) optionalProgram(field string, value Value) string {
	if value == "" {
		return ""
	}
	return v.program(field, value)
}

// atLeast is a size in bytes; what is none becomes the least. A bare number of
// bytes needs no quotes.
func (v *validator) atLeast(field string, value Value, least int64) int64 {
	var text string
	switch x := value.(type) {
	case string:
		text = x
	case int, int64:
		text = fmt.Sprint(x)
	}
	n, err := ParseSize(text)
	if err != nil {
		v.errorf(field, value, "use a size such as %q", "512MiB")
		return least
	}
	if n < least {
		v.errorf(field, value, "must be at least %q", FormatSize(least))
		return least
	}
	return n
}

func (v *validator) memory(field string, value Value, least int64) int64 {
	n := v.atLeast(field, value, least)
	if n%Granule != 0 {
		v.errorf(field, value, "must be a multiple of %q; %q is the next", FormatSize(Granule), FormatSize(RoundUp(n)))
	}
	return n
}
