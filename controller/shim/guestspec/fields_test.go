// SPDX-License-Identifier: Apache-2.0
// Copyright The containerd-cloudhv Authors

package guestspec

import (
	"fmt"
	"os"
	"reflect"
	"strings"
	"testing"

	specs "github.com/opencontainers/runtime-spec/specs-go"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
)

// What becomes of a field of the host's spec.
const (
	passed  = "passed"
	changed = "changed"
	dropped = "dropped"
	refused = "refused"
	// inside means that the fields within are listed by themselves.
	inside = "inside"
)

// fate lists every field of the types that make up a Linux spec. A type whose
// only use is refused is not gone into.
var fate = map[string]string{
	"Spec.Version": changed, "Spec.Process": inside, "Spec.Root": inside, "Spec.Hostname": dropped, "Spec.Domainname": refused,
	"Spec.Mounts": inside, "Spec.Hooks": inside, "Spec.Annotations": passed, "Spec.Linux": inside, "Spec.Solaris": refused,
	"Spec.Windows": refused, "Spec.VM": refused, "Spec.ZOS": refused, "Spec.FreeBSD": refused,

	"Process.Terminal": passed, "Process.ConsoleSize": passed, "Process.User": inside, "Process.Args": passed,
	"Process.CommandLine": refused, "Process.Env": passed, "Process.Cwd": passed, "Process.Capabilities": inside,
	"Process.Rlimits": inside, "Process.NoNewPrivileges": passed, "Process.ApparmorProfile": refused,
	"Process.OOMScoreAdj": passed, "Process.Scheduler": refused, "Process.SelinuxLabel": dropped,
	"Process.IOPriority": refused, "Process.ExecCPUAffinity": refused,
	"Box.Height": passed, "Box.Width": passed,
	"User.UID": passed, "User.GID": passed, "User.Umask": passed, "User.AdditionalGids": passed, "User.Username": refused,
	"LinuxCapabilities.Bounding": passed, "LinuxCapabilities.Effective": passed, "LinuxCapabilities.Inheritable": passed,
	"LinuxCapabilities.Permitted": passed, "LinuxCapabilities.Ambient": passed,
	"POSIXRlimit.Type": passed, "POSIXRlimit.Hard": passed, "POSIXRlimit.Soft": passed,
	"Root.Path": changed, "Root.Readonly": passed,
	"Mount.Destination": passed, "Mount.Type": passed, "Mount.Source": passed, "Mount.Options": passed,
	"Mount.UIDMappings": refused, "Mount.GIDMappings": refused,
	"Hooks.Prestart": refused, "Hooks.CreateRuntime": refused, "Hooks.CreateContainer": refused,
	"Hooks.StartContainer": refused, "Hooks.Poststart": refused, "Hooks.Poststop": refused,

	"Linux.UIDMappings": refused, "Linux.GIDMappings": refused, "Linux.Sysctl": refused, "Linux.Resources": inside,
	"Linux.CgroupsPath": changed, "Linux.Namespaces": inside, "Linux.Devices": inside, "Linux.NetDevices": refused,
	"Linux.Seccomp": inside, "Linux.RootfsPropagation": passed, "Linux.MaskedPaths": passed, "Linux.ReadonlyPaths": passed,
	"Linux.MountLabel": dropped, "Linux.IntelRdt": refused, "Linux.MemoryPolicy": refused, "Linux.Personality": inside,
	"Linux.TimeOffsets":   refused,
	"LinuxNamespace.Type": changed, "LinuxNamespace.Path": changed,
	"LinuxDevice.Path": passed, "LinuxDevice.Type": passed, "LinuxDevice.Major": passed, "LinuxDevice.Minor": passed,
	"LinuxDevice.FileMode": passed, "LinuxDevice.UID": passed, "LinuxDevice.GID": passed,
	"LinuxSeccomp.DefaultAction": passed, "LinuxSeccomp.DefaultErrnoRet": passed, "LinuxSeccomp.Architectures": passed,
	"LinuxSeccomp.Flags": passed, "LinuxSeccomp.ListenerPath": refused, "LinuxSeccomp.ListenerMetadata": refused,
	"LinuxSeccomp.Syscalls": inside,
	"LinuxSyscall.Names":    passed, "LinuxSyscall.Action": passed, "LinuxSyscall.ErrnoRet": passed, "LinuxSyscall.Args": inside,
	"LinuxSeccompArg.Index": passed, "LinuxSeccompArg.Value": passed, "LinuxSeccompArg.ValueTwo": passed, "LinuxSeccompArg.Op": passed,
	"LinuxPersonality.Domain": passed, "LinuxPersonality.Flags": refused,

	"LinuxResources.Devices": inside, "LinuxResources.Memory": inside, "LinuxResources.CPU": inside, "LinuxResources.Pids": inside,
	"LinuxResources.BlockIO": inside, "LinuxResources.HugepageLimits": refused, "LinuxResources.Network": refused,
	"LinuxResources.Rdma": refused, "LinuxResources.Unified": passed,
	"LinuxDeviceCgroup.Allow": passed, "LinuxDeviceCgroup.Type": passed, "LinuxDeviceCgroup.Major": passed,
	"LinuxDeviceCgroup.Minor": passed, "LinuxDeviceCgroup.Access": passed,
	"LinuxMemory.Limit": passed, "LinuxMemory.Reservation": passed, "LinuxMemory.Swap": passed, "LinuxMemory.Kernel": refused,
	"LinuxMemory.KernelTCP": refused, "LinuxMemory.Swappiness": refused, "LinuxMemory.DisableOOMKiller": refused,
	"LinuxMemory.UseHierarchy": dropped, "LinuxMemory.CheckBeforeUpdate": passed,
	"LinuxCPU.Shares": passed, "LinuxCPU.Quota": passed, "LinuxCPU.Burst": passed, "LinuxCPU.Period": passed,
	"LinuxCPU.RealtimeRuntime": refused, "LinuxCPU.RealtimePeriod": refused, "LinuxCPU.Cpus": dropped, "LinuxCPU.Mems": dropped,
	"LinuxCPU.Idle":       passed,
	"LinuxPids.Limit":     passed,
	"LinuxBlockIO.Weight": refused, "LinuxBlockIO.LeafWeight": refused, "LinuxBlockIO.WeightDevice": refused,
	"LinuxBlockIO.ThrottleReadBpsDevice": refused, "LinuxBlockIO.ThrottleWriteBpsDevice": refused,
	"LinuxBlockIO.ThrottleReadIOPSDevice": refused, "LinuxBlockIO.ThrottleWriteIOPSDevice": refused,
}

// fullSpec sets what a field of fate can be found in.
func fullSpec() *specs.Spec {
	one, mode, null := int64(1), os.FileMode(0o666), int64(3)
	id, no := uint32(0), false
	return &specs.Spec{
		Version: "1.3.0",
		Process: &specs.Process{
			Args: []string{"sh"}, Cwd: "/", ConsoleSize: &specs.Box{},
			Capabilities: &specs.LinuxCapabilities{},
			Rlimits:      []specs.POSIXRlimit{{Type: "RLIMIT_CORE"}},
		},
		Root:   &specs.Root{Path: "rootfs"},
		Mounts: []specs.Mount{{Destination: "/tmp", Type: "tmpfs", Source: "tmpfs", Options: []string{"nosuid"}}},
		Hooks:  &specs.Hooks{},
		Linux: &specs.Linux{
			CgroupsPath: "/kubepods/x",
			Namespaces:  namespacesOf(""),
			Devices:     []specs.LinuxDevice{{Path: "/dev/null2", Type: "c", Major: 1, Minor: 3, FileMode: &mode, UID: &id, GID: &id}},
			Seccomp: &specs.LinuxSeccomp{
				DefaultAction: specs.ActErrno,
				Syscalls:      []specs.LinuxSyscall{{Names: []string{"read"}, Action: specs.ActAllow, Args: []specs.LinuxSeccompArg{{Op: specs.OpEqualTo}}}},
			},
			Personality: &specs.LinuxPersonality{Domain: specs.PerLinux},
			Resources: &specs.LinuxResources{
				Devices:        []specs.LinuxDeviceCgroup{{Allow: true, Type: "c", Major: &one, Minor: &null, Access: "rwm"}},
				Memory:         &specs.LinuxMemory{DisableOOMKiller: &no},
				CPU:            &specs.LinuxCPU{},
				Pids:           &specs.LinuxPids{},
				BlockIO:        &specs.LinuxBlockIO{},
				HugepageLimits: []specs.LinuxHugepageLimit{{Pagesize: "2MB"}, {Pagesize: "1GB"}},
			},
		},
	}
}

const testPid = 4_000_001

// namespacesOf are those of a container whose PID namespace is at path.
func namespacesOf(path string) []specs.LinuxNamespace {
	pod := func(name string) string { return fmt.Sprintf("/proc/%d/ns/%s", testPid, name) }
	return []specs.LinuxNamespace{
		{Type: specs.PIDNamespace, Path: path},
		{Type: specs.IPCNamespace, Path: pod("ipc")},
		{Type: specs.UTSNamespace, Path: pod("uts")},
		{Type: specs.MountNamespace},
		{Type: specs.NetworkNamespace, Path: pod("net")},
	}
}

// samples are values that differ from fullSpec's and are valid where the kind's
// own sample is not.
var samples = map[string]any{
	"Process.Cwd": "/other", "LinuxDevice.Type": "u", "LinuxDevice.Minor": int64(5), "LinuxDevice.Major": int64(5),
	"LinuxDeviceCgroup.Allow": false, "LinuxDeviceCgroup.Type": "c", "Mount.Destination": "/other", "Mount.Type": "proc",
	"LinuxDeviceCgroup.Major": int64(5), "LinuxDeviceCgroup.Minor": int64(5), "LinuxSeccomp.DefaultAction": specs.ActAllow,
	"LinuxResources.Unified": map[string]string{"memory.high": "1"}, "LinuxResources.HugepageLimits": []specs.LinuxHugepageLimit{{Pagesize: "1GB"}, {Pagesize: "2MB", Limit: 1}}, "Root.Path": "other", "LinuxSyscall.Action": specs.ActErrno,
	"Linux.CgroupsPath": "/other",
}

// TestEveryField sets one field of the spec after the other and looks at what
// becomes of it.
func TestEveryField(t *testing.T) {
	t.Parallel()
	seen := make(map[string]bool)
	visitFields(t, reflect.TypeFor[specs.Spec](), seen)
	for name := range fate {
		assert.True(t, seen[name], "%s is listed, and no field of a spec", name)
	}
}

func visitFields(t *testing.T, typ reflect.Type, seen map[string]bool) {
	for i := range typ.NumField() {
		f := typ.Field(i)
		name := typ.Name() + "." + f.Name
		if seen[name] {
			continue
		}
		seen[name] = true
		switch what, ok := fate[name]; {
		case !ok:
			t.Errorf("%s (%s) is new: say what becomes of it", name, f.Type)
		case what == inside:
			elem := f.Type
			for elem.Kind() == reflect.Pointer || elem.Kind() == reflect.Slice {
				elem = elem.Elem()
			}
			require.Equal(t, reflect.Struct, elem.Kind(), name)
			visitFields(t, elem, seen)
		default:
			if name == "Process.ConsoleSize" {
				visitFields(t, reflect.TypeFor[specs.Box](), seen)
			}
			t.Run(name, func(t *testing.T) { checkField(t, typ, i, what) })
		}
	}
}

func checkField(t *testing.T, typ reflect.Type, i int, what string) {
	host := fullSpec()
	f := find(reflect.ValueOf(host), typ)
	require.True(t, f.IsValid(), "fullSpec has no %s", typ)
	name := typ.Name() + "." + typ.Field(i).Name
	field := f.Field(i)
	sample := sampleOf(field.Type(), name)
	if typ.Name() == "LinuxNamespace" {
		t.Skip("see TestNamespaces")
	}
	field.Set(sample)
	// A device is known by both of its numbers.
	switch name {
	case "LinuxDevice.Major":
		host.Linux.Devices[0].Minor = 0
	case "LinuxDeviceCgroup.Major":
		zero := int64(0)
		host.Linux.Resources.Devices[0].Minor = &zero
	}
	got, err := Translate(host, "id", Pod{SandboxPid: testPid})
	if what == refused {
		require.Error(t, err)
		json, _, _ := strings.Cut(typ.Field(i).Tag.Get("json"), ",")
		if typ.Name() == "LinuxBlockIO" {
			json = "blockIO"
		}
		assert.Contains(t, err.Error(), json)
		return
	}
	require.NoError(t, err)
	out := find(reflect.ValueOf(got.Spec), typ)
	require.True(t, out.IsValid())
	value := out.Field(i)
	switch what {
	case passed:
		assert.Equal(t, sample.Interface(), value.Interface())
	case dropped:
		assert.True(t, value.IsZero(), "%v", value)
	case changed:
		assert.NotEqual(t, sample.Interface(), value.Interface())
	}
}

// find returns the first value of a type within v.
func find(v reflect.Value, typ reflect.Type) reflect.Value {
	switch v.Kind() {
	case reflect.Pointer:
		if !v.IsNil() {
			return find(v.Elem(), typ)
		}
	case reflect.Slice:
		for i := range v.Len() {
			if f := find(v.Index(i), typ); f.IsValid() {
				return f
			}
		}
	case reflect.Struct:
		if v.Type() == typ {
			return v
		}
		for _, field := range v.Fields() {
			if f := find(field, typ); f.IsValid() {
				return f
			}
		}
	}
	return reflect.Value{}
}

func sampleOf(typ reflect.Type, name string) reflect.Value {
	if s, ok := samples[name]; ok {
		v := reflect.ValueOf(s)
		if typ.Kind() == reflect.Pointer && v.Kind() != reflect.Pointer {
			p := reflect.New(typ.Elem())
			p.Elem().Set(v.Convert(typ.Elem()))
			return p
		}
		return v.Convert(typ)
	}
	return sampleOfKind(typ)
}

func sampleOfKind(typ reflect.Type) reflect.Value {
	v := reflect.New(typ).Elem()
	switch typ.Kind() {
	case reflect.String:
		v.SetString("sample")
	case reflect.Bool:
		v.SetBool(true)
	case reflect.Int, reflect.Int32, reflect.Int64:
		v.SetInt(7)
	case reflect.Uint, reflect.Uint16, reflect.Uint32, reflect.Uint64:
		v.SetUint(7)
	case reflect.Pointer:
		v.Set(reflect.New(typ.Elem()))
		v.Elem().Set(sampleOfKind(typ.Elem()))
	case reflect.Slice:
		v.Set(reflect.MakeSlice(typ, 1, 1))
		v.Index(0).Set(sampleOfKind(typ.Elem()))
	case reflect.Map:
		v.Set(reflect.MakeMap(typ))
		v.SetMapIndex(sampleOfKind(typ.Key()), sampleOfKind(typ.Elem()))
	}
	return v
}
