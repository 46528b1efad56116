// SPDX-License-Identifier: Apache-2.0
// Copyright The containerd-cloudhv Authors

// Package directvolume has the file systems of block devices, or of images of such, that a
// pod is given directly: its VM mounts them, and the host does not. The controller reads
// them from the pod's annotation, and the shim finds them among containers' mounts.
package directvolume

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"path"
	"slices"
	"strconv"
	"strings"

	"github.com/containerd/errdefs"

	"github.com/cloudhv/containerd-cloudhv/guest/api"
)

// Most is how many direct volumes a pod may have.
const Most = 16

// Volume is a direct volume, with the names that Kata Containers has for its parts.
type Volume struct {
	// Volume is a path of the host that containers mount, or the name of one of the pod's
	// volumes, which is the path where kubelet has that.
	Volume string `json:"volume"`
	// Device is the path of a block device, or of a file that is an image of one.
	Device string `json:"device"`
	// FSType is one of api.DiskFileSystems.
	FSType string `json:"fstype"`
	// Options are ro, rw, and some of api.DiskMountOptions.
	Options []string `json:"options,omitempty"`
}

// ReadOnly is true if nothing of it can be written.
func (v Volume) ReadOnly() bool { return v.FSType == "erofs" || slices.Contains(v.Options, "ro") }

// MountOptions are those for the agent.
func (v Volume) MountOptions() []string {
	return slices.DeleteFunc(slices.Clone(v.Options), func(o string) bool { return o == "ro" || o == "rw" })
}

// Serial is that of a direct volume's disk, by its place from 1 on.
func Serial(place int) string { return "volume-" + strconv.Itoa(place) }

// isName says whether a volume of a pod, or a persistent one, can be called so.
func isName(s string) bool {
	const most = 253
	if s == "" || len(s) > most || s == "." || s == ".." {
		return false
	}
	for _, c := range []byte(s) {
		if (c < 'a' || c > 'z') && (c < 'A' || c > 'Z') && (c < '0' || c > '9') && c != '-' && c != '.' && c != '_' {
			return false
		}
	}
	return true
}

const example = `[{"volume":"data","device":"/dev/vg/data","fstype":"ext4"}]`

// Parse reads a list of volumes in JSON. The error names all that is wrong.
func Parse(text string) ([]Volume, error) {
	dec := json.NewDecoder(bytes.NewReader([]byte(text)))
	dec.DisallowUnknownFields()
	var volumes []Volume
	err := dec.Decode(&volumes)
	if err == nil {
		if _, more := dec.Token(); !errors.Is(more, io.EOF) {
			err = errors.New("there is something after the list")
		}
	}
	if err != nil {
		return nil, fmt.Errorf("must be a list of volumes in JSON, such as %s: %w", example, err)
	}
	if len(volumes) > Most {
		return nil, fmt.Errorf("must be at most %d volumes", Most)
	}
	var errs []error
	for i, v := range volumes {
		errs = append(errs, v.check(fmt.Sprintf("[%d].", i)))
		if at := slices.IndexFunc(volumes, func(o Volume) bool { return o.Volume == v.Volume }); at < i {
			errs = append(errs, fmt.Errorf("[%d].volume = %q: [%d] has it already", i, v.Volume, at))
		}
	}
	return volumes, errors.Join(errs...)
}

func (v Volume) check(at string) error {
	var errs []error
	bad := func(field, value, want string) {
		errs = append(errs, fmt.Errorf("%s%s = %q: must be %s", at, field, value, want))
	}
	switch {
	case path.IsAbs(v.Volume):
		if path.Clean(v.Volume) != v.Volume || v.Volume == "/" || strings.ContainsRune(v.Volume, 0) {
			bad("volume", v.Volume, "a path without . and .. and // and no / at its end")
		}
	case !isName(v.Volume):
		bad("volume", v.Volume, "the name of one of the pod's volumes, or the absolute path on the host that containers mount")
	}
	if !path.IsAbs(v.Device) || strings.ContainsRune(v.Device, 0) {
		bad("device", v.Device, "the absolute path of a block device, or of a file that is an image of one")
	}
	if !slices.Contains(api.DiskFileSystems, v.FSType) {
		bad("fstype", v.FSType, "one of "+strings.Join(api.DiskFileSystems, ", "))
	}
	for _, o := range v.Options {
		switch {
		case o == "ro", o == "rw" && !v.ReadOnly():
		case o == "discard" && v.ReadOnly(), o == "rw":
			bad("options", o, "none for a volume that is read-only")
		case !slices.Contains(api.DiskMountOptions, o):
			bad("options", o, "some of ro, rw, "+strings.Join(api.DiskMountOptions, ", "))
		}
	}
	return errors.Join(errs...)
}

// Match says which volume, by its place from 1 on, a mount's path on the host is of, and
// where in it that is; 0 is none. It returns ErrInvalidArgument for one that kubelet has
// made of a part of a direct volume: it cannot be known which.
func Match(volumes []Volume, hostPath, podUID string) (place int, below string, _ error) {
	hostPath = path.Clean(hostPath)
	most := -1
	for i, v := range volumes {
		under, ok := v.below(hostPath, podUID)
		if ok && (most < 0 || len(under) < most) {
			place, below, most = i+1, under, len(under)
		}
		if v.isSubPath(hostPath, podUID) {
			return 0, "", fmt.Errorf("%q is a subPath of the direct volume %q, which kubelet has looked for on the host, where it is not: want a mount without subPath: %w",
				hostPath, v.Volume, errdefs.ErrInvalidArgument)
		}
	}
	return place, below, nil
}

// below is where in the volume a path of the host is.
func (v Volume) below(hostPath, podUID string) (string, bool) {
	if path.IsAbs(v.Volume) {
		return cutPath(hostPath, v.Volume)
	}
	rest, ok := ofPod(hostPath, podUID, "volumes")
	if !ok {
		return "", false
	}
	plugin, rest, _ := strings.Cut(rest, "/")
	under, ok := cutPath(rest, v.Volume)
	if !ok || plugin != csi {
		return under, ok
	}
	return cutPath(under, "mount")
}

// csi is the plugin whose volumes kubelet has one directory deeper.
const csi = "kubernetes.io~csi"

func (v Volume) isSubPath(hostPath, podUID string) bool {
	rest, ok := ofPod(hostPath, podUID, "volume-subpaths")
	if !ok || path.IsAbs(v.Volume) {
		return false
	}
	_, ok = cutPath(rest, v.Volume)
	return ok
}

// ofPod is what follows in a path to a directory that kubelet has for a pod.
func ofPod(hostPath, podUID, dir string) (string, bool) {
	if podUID == "" {
		return "", false
	}
	_, rest, ok := strings.Cut(hostPath, "/pods/"+podUID+"/"+dir+"/")
	return rest, ok
}

// cutPath is the part of a path below another, "" for that itself.
func cutPath(p, top string) (string, bool) {
	if p == top {
		return "", true
	}
	return strings.CutPrefix(p, top+"/")
}
