// SPDX-License-Identifier: Apache-2.0
// Copyright The containerd-cloudhv Authors

package ninep

import (
	"encoding/binary"
	"math"

	"golang.org/x/sys/unix"
)

// version is the only one spoken.
const version = "9P2000.L"

// Types of messages. An answer's is the request's and one.
const (
	tLerror      = 6
	tStatfs      = 8
	tLopen       = 12
	tLcreate     = 14
	tSymlink     = 16
	tMknod       = 18
	tRename      = 20
	tReadlink    = 22
	tGetattr     = 24
	tSetattr     = 26
	tXattrwalk   = 30
	tXattrcreate = 32
	tReaddir     = 40
	tFsync       = 50
	tLock        = 52
	tGetlock     = 54
	tLink        = 70
	tMkdir       = 72
	tRenameat    = 74
	tUnlinkat    = 76
	tVersion     = 100
	tAuth        = 102
	tAttach      = 104
	tFlush       = 108
	tWalk        = 110
	tRead        = 116
	tWrite       = 118
	tClunk       = 120
	tRemove      = 122
)

const (
	// headerBytes are a message's size, type and tag.
	headerBytes = 4 + 1 + 2
	noTag       = 0xffff
	noFid       = 0xffffffff
	noUID       = 0xffffffff
	// maxWalk is the most names of one walk.
	maxWalk = 16
	// maxName is the longest name that Linux has.
	maxName = unix.NAME_MAX
)

// Types of a qid.
const (
	qidDir     = 0x80
	qidSymlink = 0x02
	qidFile    = 0x00
)

// qid is what the protocol has for an inode. Its version is 0 always: Linux's client
// then reads and writes by messages, and not by its page cache.
type qid struct {
	typ  uint8
	path uint64
}

// decoder takes a message apart. After the first field that is not there, all others
// are zero and bad is true.
type decoder struct {
	b   []byte
	bad bool
}

func (d *decoder) take(n int) []byte {
	if d.bad || n > len(d.b) {
		d.bad = true
		return nil
	}
	out := d.b[:n]
	d.b = d.b[n:]
	return out
}

func (d *decoder) u8() uint8 {
	if b := d.take(1); b != nil {
		return b[0]
	}
	return 0
}

func (d *decoder) u16() uint16 {
	if b := d.take(2); b != nil {
		return binary.LittleEndian.Uint16(b)
	}
	return 0
}

func (d *decoder) u32() uint32 {
	if b := d.take(4); b != nil {
		return binary.LittleEndian.Uint32(b)
	}
	return 0
}

func (d *decoder) u64() uint64 {
	if b := d.take(8); b != nil {
		return binary.LittleEndian.Uint64(b)
	}
	return 0
}

// offset is a position in a file, or a size, which is never negative on the host.
func (d *decoder) offset() int64 {
	v := d.u64()
	if v > math.MaxInt64 {
		d.bad = true
		return 0
	}
	return int64(v)
}

func (d *decoder) string() string { return string(d.take(int(d.u16()))) }

// encoder appends fields to a message.
type encoder struct{ b []byte }

func (e *encoder) u8(v uint8)   { e.b = append(e.b, v) }
func (e *encoder) u16(v uint16) { e.b = binary.LittleEndian.AppendUint16(e.b, v) }
func (e *encoder) u32(v uint32) { e.b = binary.LittleEndian.AppendUint32(e.b, v) }
func (e *encoder) u64(v uint64) { e.b = binary.LittleEndian.AppendUint64(e.b, v) }

func (e *encoder) string(s string) {
	e.u16(uint16(len(s)))
	e.b = append(e.b, s...)
}

func (e *encoder) qid(q qid) {
	e.u8(q.typ)
	e.u32(0)
	e.u64(q.path)
}

// begin begins an answer, whose size finish fills in.
func (e *encoder) begin(typ uint8, tag uint16) {
	e.b = append(e.b[:0], 0, 0, 0, 0, typ)
	e.u16(tag)
}

func (e *encoder) finish() []byte {
	binary.LittleEndian.PutUint32(e.b, uint32(len(e.b)))
	return e.b
}
