// SPDX-License-Identifier: Apache-2.0
// Copyright The containerd-cloudhv Authors

// Package volumes keeps what a pod's containers mount of the host, and has package
// ninep serve it to the VM.
package volumes

import (
	"errors"
	"fmt"
	"slices"
	"strconv"
	"strings"
	"sync"

	"github.com/containerd/errdefs"
	specs "github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"

	"github.com/cloudhv/containerd-cloudhv/controller/shim/ninep"
	"github.com/cloudhv/containerd-cloudhv/guest/api"
)

// Set has the volumes of one pod. Its methods may be called concurrently.
type Set struct {
	// Server serves the volumes.
	Server *ninep.Server

	mu   sync.Mutex
	last uint64
	// maps are the ID mappings that mounts have had.
	maps    map[string]*idMap
	volumes map[key]*volume
	// used are the volumes of each container.
	used map[string][]*volume
}

// key is what makes two mounts one volume. A source that was removed and made anew
// meanwhile is another one.
type key struct {
	source  string
	options Options
	dev     uint64
	ino     uint64
}

type volume struct {
	key  key
	name string
	tree *tree
	// readonly says that nothing in the volume can be written, now or later.
	readonly bool
	users    int
}

// NewSet makes an empty set.
func NewSet() *Set {
	return &Set{
		Server:  ninep.NewServer(ninep.Limits{}),
		maps:    make(map[string]*idMap),
		volumes: make(map[key]*volume),
		used:    make(map[string][]*volume),
	}
}

// Add has the bind mounts among a container's mounts come from volumes: their sources
// become the guest's, and so do their options. Others stay as they are. The error names
// every mount that is refused; there is no volume more than before then. Remove is to be
// called after a success.
func (s *Set) Add(container string, mounts []specs.Mount) (retErr error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.used[container] != nil {
		return fmt.Errorf("volumes of container %q: %w", container, errdefs.ErrAlreadyExists)
	}
	var (
		used    []*volume
		refused []error
	)
	defer func() {
		if retErr != nil {
			s.put(used)
		}
	}()
	for i := range mounts {
		m := &mounts[i]
		if m.Type != "bind" {
			continue
		}
		v, err := s.volumeOf(m)
		if err != nil {
			refused = append(refused, fmt.Errorf("mount %q of %q: %w", m.Destination, m.Source, err))
			continue
		}
		used = append(used, v)
		m.Source, m.Options = api.VolumeRoot+"/"+v.name, v.guestOptions(m.Options)
		m.UIDMappings, m.GIDMappings = nil, nil
	}
	if len(refused) > 0 {
		return errors.Join(refused...)
	}
	if len(used) > 0 {
		s.used[container] = used
	}
	return nil
}

// Remove gives up a container's volumes. One that no other container uses is closed, and
// nothing of the host is in use for it any more.
func (s *Set) Remove(container string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.put(s.used[container])
	delete(s.used, container)
}

// Close gives up all volumes.
func (s *Set) Close() {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, used := range s.used {
		s.put(used)
	}
	clear(s.used)
	for _, m := range s.maps {
		_ = m.userns.Close()
	}
	clear(s.maps)
}

func (s *Set) put(used []*volume) {
	for _, v := range used {
		v.users--
		if v.users == 0 {
			s.Server.Remove(v.name)
			v.tree.close()
			delete(s.volumes, v.key)
		}
	}
}

// volumeOf finds or makes a mount's volume, for one user more.
func (s *Set) volumeOf(m *specs.Mount) (*volume, error) {
	o := optionsOf(m.Options)
	var err error
	if o.ids, err = s.idMapOf(m); err != nil {
		return nil, err
	}
	return s.get(m.Source, o)
}

// get finds or makes a volume, for one user more.
func (s *Set) get(source string, o Options) (*volume, error) {
	var st unix.Stat_t
	if err := unix.Stat(source, &st); err != nil {
		return nil, fmt.Errorf("%w: %w", err, errdefs.ErrInvalidArgument)
	}
	k := key{source: source, options: o, dev: st.Dev, ino: st.Ino}
	if v := s.volumes[k]; v != nil {
		v.users++
		return v, nil
	}
	v, err := s.open(k)
	if err != nil {
		return nil, err
	}
	s.volumes[k] = v
	return v, nil
}

func (s *Set) open(k key) (_ *volume, retErr error) {
	v := &volume{key: k, users: 1}
	if k.options.Readonly && !k.options.Slave {
		below := false
		if k.options.Recursive && !k.options.RecursiveReadonly {
			var err error
			if below, err = hasMounts(k.source); err != nil {
				return nil, fmt.Errorf("look for mounts below it: %w", err)
			}
		}
		v.readonly = !below
	}
	t, err := openTree(k.source, k.options)
	if err != nil {
		if !errdefs.IsInvalidArgument(err) {
			err = fmt.Errorf("%w: %w", err, errdefs.ErrInvalidArgument)
		}
		return nil, err
	}
	s.last++
	v.name, v.tree = strconv.FormatUint(s.last, 10), t
	if err := s.Server.Add(v.name, t.fd, k.options.maker()); err != nil {
		t.close()
		return nil, err
	}
	return v, nil
}

// optionsOf reads the options of a bind mount.
func optionsOf(options []string) Options {
	var o Options
	for _, name := range options {
		switch name {
		case "ro":
			o.Readonly = true
		case "rro":
			o.Readonly, o.RecursiveReadonly = true, true
		case "rbind":
			o.Recursive = true
		case "slave", "rslave":
			o.Slave = true
		}
	}
	return o
}

// guestOptions are those of the bind mount in the guest. What is mounted below the source
// is a part of the volume there, and no mount: so read-only is the mount only if all of
// it is, and the host's clone sees to the rest.
func (v *volume) guestOptions(options []string) []string {
	access := "rw"
	if v.readonly {
		access = "ro"
	}
	out := []string{"rbind", "rprivate", access}
	for _, name := range options {
		if slices.Contains([]string{"nosuid", "nodev", "noexec", "noatime", "nodiratime", "relatime", "strictatime"}, strings.TrimPrefix(name, "r")) {
			out = append(out, name)
		}
	}
	return out
}

// Has tells whether a container has volumes.
func (s *Set) Has(container string) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.used[container] != nil
}
