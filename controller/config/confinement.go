// SPDX-License-Identifier: Apache-2.0
// Copyright The containerd-cloudhv Authors

package config

import (
	"math"
	"os"
)

const (
	// minUID is the first that no system user has. maxUID leaves out those that mean
	// nobody, also to programs that read them as signed.
	minUID  = 1000
	maxUID  = math.MaxInt32 - 1
	maxUIDs = 1 << 24
)

func (v *validator) confinement(c Confinement, s *Settings, host HostInfo) {
	wrong := len(v.errs)
	s.Confine = v.flag("confinement.enabled", c.Enabled)
	s.VMMUsers.First = uint32(v.count("confinement.first_uid", c.FirstUID, minUID, maxUID))
	s.VMMUsers.Count = uint32(v.count("confinement.uids", c.UIDs, 1, maxUIDs))
	if len(v.errs) > wrong || !s.Confine {
		return
	}
	if last := int64(s.VMMUsers.First) + int64(s.VMMUsers.Count) - 1; last > maxUID {
		v.errorf("confinement.uids", c.UIDs, "the last would be %d; %d is the last that can be", last, maxUID)
		return
	}
	if err := host.Users.Check(s.VMMUsers); err != nil {
		v.errorf("confinement.first_uid", c.FirstUID, "choose users that are nobody's: %v", err)
	}
	const anyone = 0o004
	for field, path := range map[string]string{"kernel": s.Kernel, "image": s.Image} {
		if st, err := os.Stat(path); err == nil && st.Mode()&anyone == 0 {
			v.errorf(field, path, "confined VMMs are no root and cannot read it: chmod a+r")
		}
	}
}
