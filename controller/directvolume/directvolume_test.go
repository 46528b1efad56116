// SPDX-License-Identifier: Apache-2.0
// Copyright The containerd-cloudhv Authors

package directvolume

import (
	"strings"
	"testing"

	"github.com/containerd/errdefs"
	"github.com/stretchr/testify/require"
)

func TestParse(t *testing.T) {
	t.Parallel()
	got, err := Parse(example)
	require.NoError(t, err)
	require.Equal(t, []Volume{{Volume: "data", Device: "/dev/vg/data", FSType: "ext4"}}, got)
	got, err = Parse(`[{"volume":"/mnt/a","device":"/x.img","fstype":"xfs","options":["ro","noatime"]},
		{"volume":"b","device":"/y","fstype":"erofs","options":["nosuid"]},
		{"volume":"c","device":"/z","fstype":"ext4","options":["rw","discard"]}]`)
	require.NoError(t, err)
	require.Equal(t, []bool{true, true, false}, []bool{got[0].ReadOnly(), got[1].ReadOnly(), got[2].ReadOnly()})
	require.Equal(t, []string{"noatime"}, got[0].MountOptions())
	require.Equal(t, []string{"ro", "noatime"}, got[0].Options)

	one := func(fields string) string { return `[{"volume":"v","device":"/d","fstype":"ext4",` + fields + `}]` }
	for name, tc := range map[string]struct{ text, want string }{
		"no JSON":            {"/dev/sda", "a list of volumes in JSON, such as " + example},
		"nothing":            {"", "a list of volumes in JSON"},
		"no list":            {`{"volume":"v"}`, "a list of volumes in JSON"},
		"more than a list":   {`[] []`, "something after the list"},
		"unknown field":      {one(`"type":"ext4"`), `unknown field "type"`},
		"no name":            {one(`"volume":"a/b"`), `[0].volume = "a/b": must be the name`},
		"a root":             {one(`"volume":"/"`), `[0].volume = "/"`},
		"a path with dots":   {one(`"volume":"/a/../b"`), `[0].volume = "/a/../b": must be a path without`},
		"a relative device":  {one(`"device":"sda"`), `[0].device = "sda": must be the absolute path`},
		"another type":       {one(`"fstype":"btrfs"`), `[0].fstype = "btrfs": must be one of ext4, xfs, erofs`},
		"an option of none":  {one(`"options":["data=writeback"]`), `[0].options = "data=writeback": must be some of ro, rw, noatime`},
		"a device's nodes":   {one(`"options":["dev"]`), `[0].options = "dev"`},
		"both":               {one(`"options":["ro","rw"]`), `[0].options = "rw": must be none`},
		"discard of nothing": {one(`"fstype":"erofs","options":["discard"]`), `[0].options = "discard": must be none`},
		"twice":              {`[{"volume":"v","device":"/d","fstype":"ext4"},{"volume":"v","device":"/e","fstype":"ext4"}]`, `[1].volume = "v": [0] has it already`},
		"too many":           {"[" + strings.Repeat(`{"volume":"v"},`, Most) + `{"volume":"v"}]`, "at most 16 volumes"},
		"all that is wrong":  {`[{"volume":"","device":"x","fstype":"y"}]`, `[0].fstype = "y"`},
	} {
		_, err := Parse(tc.text)
		require.ErrorContains(t, err, tc.want, name)
	}
}

func TestMatch(t *testing.T) {
	t.Parallel()
	volumes := []Volume{{Volume: "/mnt/a"}, {Volume: "data"}, {Volume: "/mnt/a/deep"}}
	const pods, uid = "/var/lib/kubelet/pods/", "12-34"
	for hostPath, want := range map[string]struct {
		place int
		below string
	}{
		"/mnt/a":         {1, ""},
		"/mnt/a/":        {1, ""},
		"/mnt/a/b/c":     {1, "b/c"},
		"/mnt/a/../a/b":  {1, "b"},
		"/mnt/ab":        {},
		"/mnt":           {},
		"/mnt/a/deep/er": {3, "er"},
		pods + uid + "/volumes/kubernetes.io~empty-dir/data":      {2, ""},
		pods + uid + "/volumes/kubernetes.io~empty-dir/data/x":    {2, "x"},
		pods + uid + "/volumes/kubernetes.io~csi/data/mount":      {2, ""},
		pods + uid + "/volumes/kubernetes.io~csi/data/mount/x":    {2, "x"},
		pods + uid + "/volumes/kubernetes.io~csi/data/vol_data":   {},
		pods + uid + "/volumes/kubernetes.io~empty-dir/data2":     {},
		pods + "other/volumes/kubernetes.io~empty-dir/data":       {},
		pods + uid + "/volume-subpaths/other/c/0":                 {},
		pods + uid + "/volumes/kubernetes.io~empty-dir/../x/data": {2, ""},
	} {
		place, below, err := Match(volumes, hostPath, uid)
		require.NoError(t, err, hostPath)
		require.Equal(t, want.place, place, hostPath)
		require.Equal(t, want.below, below, hostPath)
	}
	place, _, err := Match(volumes, pods+"/volumes/x/data", "")
	require.NoError(t, err)
	require.Zero(t, place, "without a pod there are no names")
	_, _, err = Match(volumes, pods+uid+"/volume-subpaths/data/c/0", uid)
	require.ErrorIs(t, err, errdefs.ErrInvalidArgument)
	require.ErrorContains(t, err, `subPath of the direct volume "data"`)
}
