// SPDX-License-Identifier: Apache-2.0
// Copyright The containerd-cloudhv Authors

package main

import (
	"encoding/binary"
	"fmt"
	"io"
	"net"
)

// Types of 9P2000.L.
const (
	tVersion     = 100
	tAttach      = 104
	tWalk        = 110
	tXattrcreate = 32
	tWrite       = 118
	tGetattr     = 24
	rLerror      = 7
	noFid        = 0xffffffff
	noTag        = 0xffff
)

// What the client takes: more attributes, and more fids, than it is to get.
const (
	xattrBytes = 64 << 10
	xattrs     = 200
	fids       = 70_000
	batch      = 16
)

type message struct{ b []byte }

func begin(typ byte, tag uint16) *message {
	m := &message{b: []byte{0, 0, 0, 0, typ}}
	m.b = binary.LittleEndian.AppendUint16(m.b, tag)
	return m
}

func (m *message) u16(v uint16) *message {
	m.b = binary.LittleEndian.AppendUint16(m.b, v)
	return m
}

func (m *message) u32(v uint32) *message {
	m.b = binary.LittleEndian.AppendUint32(m.b, v)
	return m
}

func (m *message) u64(v uint64) *message {
	m.b = binary.LittleEndian.AppendUint64(m.b, v)
	return m
}

func (m *message) str(s string) *message {
	m.b = append(binary.LittleEndian.AppendUint16(m.b, uint16(len(s))), s...)
	return m
}

func (m *message) bytes() []byte {
	binary.LittleEndian.PutUint32(m.b, uint32(len(m.b)))
	return m.b
}

// volume is the name of a pod's first volume.
const volume = "1"

// volumes is a client of the pod's volumes that takes all it can get: paths out of the
// volume, attributes that it never finishes, then fids without end, and last requests
// whose answers nobody takes.
func (g *guest) volumes(conn net.Conn) {
	if g.mode != "volumes" {
		return
	}
	c := &client{conn: conn}
	c.ask(begin(tVersion, noTag).u32(128 << 10).str("9P2000.L"))
	c.ask(begin(tAttach, 0).u32(0).u32(noFid).str("").str("").u32(0))
	refused := 0
	for _, path := range [][]string{{volume, ".."}, {"..", "etc"}, {volume, "../../etc/passwd"}, {volume, "a/../../x"}, {volume, ""}} {
		refused += c.ask(walk(0, 1, path...))
	}
	fmt.Println("hostile: paths refused:", refused)
	refused = 0
	data := make([]byte, xattrBytes)
	for id := range uint32(xattrs) {
		refused += c.ask(walk(0, 10+id, volume))
		refused += c.ask(begin(tXattrcreate, 0).u32(10 + id).str("user.x").u64(xattrBytes).u32(0))
		write := begin(tWrite, 0).u32(10 + id).u64(0).u32(xattrBytes)
		write.b = append(write.b, data...)
		c.ask(write)
	}
	fmt.Println("hostile: attributes refused:", refused)
	refused = 0
	for id := uint32(1000); id < fids; id += batch {
		all := make([]*message, batch)
		for i := range all {
			all[i] = walk(0, id+uint32(i), volume)
		}
		refused += c.ask(all...)
	}
	fmt.Println("hostile: fids refused:", refused)
	for tag := uint16(0); ; tag = (tag + 1) % (noTag - 1) {
		m := begin(tGetattr, tag).u32(0).u64(0x7ff)
		if _, err := conn.Write(m.bytes()); err != nil {
			fmt.Println("hostile: volumes:", err)
			return
		}
	}
}

func walk(from, to uint32, names ...string) *message {
	m := begin(tWalk, 0).u32(from).u32(to).u16(uint16(len(names)))
	for _, n := range names {
		m.str(n)
	}
	return m
}

// client asks and waits for the answers.
type client struct{ conn net.Conn }

// ask sends messages, each under a tag of its own unless it is the only one, and returns
// how many of the answers are errors.
func (c *client) ask(all ...*message) (refused int) {
	for i, m := range all {
		if len(all) > 1 {
			binary.LittleEndian.PutUint16(m.b[5:], uint16(i))
		}
		if _, err := c.conn.Write(m.bytes()); err != nil {
			return len(all)
		}
	}
	for range all {
		var head [7]byte
		if _, err := io.ReadFull(c.conn, head[:]); err != nil {
			return len(all)
		}
		rest := int64(binary.LittleEndian.Uint32(head[:])) - int64(len(head))
		if _, err := io.CopyN(io.Discard, c.conn, rest); err != nil {
			return len(all)
		}
		if head[4] == rLerror {
			refused++
		}
	}
	return refused
}
