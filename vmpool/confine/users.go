// SPDX-License-Identifier: Apache-2.0
// Copyright The containerd-cloudhv Authors

package confine

import (
	"bufio"
	"bytes"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"

	"github.com/containerd/errdefs"
)

// Range is a range of user and group numbers.
type Range struct {
	First, Count uint32
}

// Last is the last number of the range.
func (r Range) Last() uint32 { return r.First + r.Count - 1 }

func (r Range) String() string { return fmt.Sprintf("%d to %d", r.First, r.Last()) }

func (r Range) holds(id uint32) bool { return id >= r.First && id-r.First < r.Count }

func (r Range) overlaps(o Range) bool {
	return r.Count > 0 && o.Count > 0 && (r.holds(o.First) || o.holds(r.First))
}

// Database is where a host's users and groups are written down, and the ranges that
// are given to users for namespaces of theirs.
type Database struct {
	Passwd, Group  string
	SubUID, SubGID string
}

// HostDatabase is this host's.
var HostDatabase = Database{Passwd: "/etc/passwd", Group: "/etc/group", SubUID: "/etc/subuid", SubGID: "/etc/subgid"}

// Check says what of the range is somebody's already. The error names all of it and
// wraps ErrInvalidArgument. Files that do not exist name nobody.
func (d Database) Check(r Range) error {
	var taken []string
	for _, path := range []string{d.Passwd, d.Group} {
		err := eachLine(path, func(fields []string) {
			// name:password:number in both files.
			if id, ok := number(fields, 2); ok && r.holds(id) {
				taken = append(taken, fmt.Sprintf("%s has %s with the number %d", path, fields[0], id))
			}
		})
		if err != nil {
			return err
		}
	}
	for _, path := range []string{d.SubUID, d.SubGID} {
		err := eachLine(path, func(fields []string) {
			first, ok1 := number(fields, 1)
			count, ok2 := number(fields, 2)
			if theirs := (Range{first, count}); ok1 && ok2 && r.overlaps(theirs) {
				taken = append(taken, fmt.Sprintf("%s gives %s to %s", path, theirs, fields[0]))
			}
		})
		if err != nil {
			return err
		}
	}
	if len(taken) > 0 {
		return fmt.Errorf("users %s: %s: %w", r, strings.Join(taken, ", "), errdefs.ErrInvalidArgument)
	}
	return nil
}

func eachLine(path string, do func(fields []string)) error {
	f, err := os.Open(path)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	defer f.Close() //nolint:errcheck // only read
	lines := bufio.NewScanner(f)
	for lines.Scan() {
		if line := strings.TrimSpace(lines.Text()); line != "" && line[0] != '#' {
			do(strings.Split(line, ":"))
		}
	}
	return lines.Err()
}

func number(fields []string, i int) (uint32, bool) {
	if len(fields) <= i {
		return 0, false
	}
	n, err := strconv.ParseUint(fields[i], 10, 32)
	return uint32(n), err == nil
}

// Users gives each VM a user of its own. Who has which is written in the VMs' records:
// whoever makes Users claims those first. Its methods may be called concurrently, and
// on nil, which gives nobody a user.
type Users struct {
	all Range

	mu    sync.Mutex
	taken map[uint32]string // the VM that has it
	next  uint32            // the offset to look from: a number is used again as late as can be
}

// NewUsers gives users of a range.
func NewUsers(all Range) *Users { return &Users{all: all, taken: map[uint32]string{}} }

// Take gives the VM a user that no other has. ErrResourceExhausted means that all are
// taken. On nil it gives 0.
func (u *Users) Take(vm string) (uint32, error) {
	if u == nil {
		return 0, nil
	}
	u.mu.Lock()
	defer u.mu.Unlock()
	for range u.all.Count {
		id := u.all.First + u.next
		u.next = (u.next + 1) % u.all.Count
		if _, taken := u.taken[id]; !taken {
			u.taken[id] = vm
			return id, nil
		}
	}
	return 0, fmt.Errorf("all users for VMs, %s, are taken: %w", u.all, errdefs.ErrResourceExhausted)
}

// Claim takes the user that a VM's record names. What is outside the range, or 0, is
// no matter.
func (u *Users) Claim(id uint32, vm string) {
	if u == nil || !u.all.holds(id) {
		return
	}
	u.mu.Lock()
	defer u.mu.Unlock()
	u.taken[id] = vm
	u.next = (id - u.all.First + 1) % u.all.Count
}

// Release gives back the user of a VM that has ended. It may be repeated.
func (u *Users) Release(id uint32, vm string) {
	if u == nil {
		return
	}
	u.mu.Lock()
	defer u.mu.Unlock()
	if u.taken[id] == vm {
		delete(u.taken, id)
	}
}

// stranger has the users of processes that no record tells of.
const stranger = "a process"

// ClaimRunning takes the users of all processes that run now and that no VM has, so
// that nobody gets company.
func (u *Users) ClaimRunning() error {
	if u == nil {
		return nil
	}
	entries, err := os.ReadDir("/proc")
	if err != nil {
		return fmt.Errorf("find the users of processes: %w", err)
	}
	for _, e := range entries {
		if _, err := strconv.Atoi(e.Name()); err != nil {
			continue
		}
		status, err := os.ReadFile(filepath.Join("/proc", e.Name(), "status"))
		if err != nil {
			continue // it has ended
		}
		for line := range bytes.Lines(status) {
			if ids, ok := bytes.CutPrefix(line, []byte("Uid:")); ok {
				for id := range strings.FieldsSeq(string(ids)) {
					if n, ok := number([]string{id}, 0); ok {
						u.claimFree(n)
					}
				}
			}
		}
	}
	return nil
}

func (u *Users) claimFree(id uint32) {
	u.mu.Lock()
	defer u.mu.Unlock()
	if _, taken := u.taken[id]; !taken && u.all.holds(id) {
		u.taken[id] = stranger
	}
}
