// SPDX-License-Identifier: Apache-2.0
// Copyright The containerd-cloudhv Authors

package volumes

import (
	"fmt"
	"os"
	"path/filepath"
	"testing"

	"github.com/containerd/errdefs"
	specs "github.com/opencontainers/runtime-spec/specs-go"
	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"
)

func mapped(m specs.Mount) specs.Mount {
	m.UIDMappings = []specs.LinuxIDMapping{{HostID: 131072, Size: 1000}, {ContainerID: 2000, HostID: 5000, Size: 1}}
	m.GIDMappings = []specs.LinuxIDMapping{{HostID: 262144, Size: 1000}}
	return m
}

func ownersAt(t *testing.T, path string) string {
	t.Helper()
	var st unix.Stat_t
	require.NoError(t, unix.Stat(path, &st))
	return fmt.Sprintf("%d:%d", st.Uid, st.Gid)
}

// TestIDMapped looks at the owners in a mount with ID mappings, and at what a set keeps.
func TestIDMapped(t *testing.T) {
	dir := mounted(t)
	for name, id := range map[string]int{"root": 0, "user": 999, "other": 2000, "stranger": 1000, "sub dir/root": 0} {
		file := filepath.Join(dir, name)
		require.NoError(t, os.WriteFile(file, nil, 0o644))
		require.NoError(t, os.Chown(file, id, min(id, 1000)))
	}
	for _, options := range [][]string{{"rprivate"}, {"rslave"}, {"rro"}} {
		t.Run(options[0], func(t *testing.T) {
			s := NewSet()
			t.Cleanup(s.Close)
			all := []specs.Mount{bind(dir, options...), mapped(bind(dir, options...)), mapped(bind(dir, options...)), mapped(bind(filepath.Join(dir, "root"), options...))}
			require.NoError(t, s.Add("a", all))
			require.NotEqual(t, all[0].Source, all[1].Source, "without mappings it is another volume")
			require.Equal(t, all[1].Source, all[2].Source)
			require.Len(t, s.maps, 1)
			for _, m := range all {
				require.Empty(t, m.UIDMappings)
				require.Empty(t, m.GIDMappings)
			}
			for _, v := range s.volumes {
				if v.key.options.ids == nil || v.key.source != dir {
					continue
				}
				for name, want := range map[string]string{
					"root": "131072:262144", "user": "132071:263143", "other": "5000:65534", "stranger": "65534:65534",
					"sub dir/root": "0:0", // what is mounted below is not mapped, as by runc
				} {
					require.Equal(t, want, ownersAt(t, at(v.tree.fd, name)), name)
				}
			}
			s.Remove("a")
			require.Empty(t, s.volumes)
		})
	}
}

func TestIDMappingsRefused(t *testing.T) {
	dir := mounted(t)
	s := NewSet()
	t.Cleanup(s.Close)
	overlapping := mapped(bind(dir))
	overlapping.UIDMappings[1].ContainerID = 1
	err := s.Add("a", []specs.Mount{overlapping, mapped(bind("/proc/sys")), bind(dir)})
	require.ErrorIs(t, err, errdefs.ErrInvalidArgument)
	require.ErrorContains(t, err, "are not what the kernel takes")
	require.ErrorContains(t, err, `of "/proc/sys": it lies on proc, which has no ID-mapped mounts`)
	require.Empty(t, s.volumes)
	require.Len(t, s.maps, 1)
}
