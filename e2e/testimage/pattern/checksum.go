// SPDX-License-Identifier: Apache-2.0
// Copyright The containerd-cloudhv Authors

package pattern

import (
	"encoding/binary"
	"fmt"
	"math/bits"
)

// Checksum is a checksum of 128 bits that tells chance from truth, not friend
// from foe. It takes a few instructions for eight bytes: in software emulation
// SHA-256 takes a minute for what this does in a second. The zero value is ready.
type Checksum struct {
	a, b uint64
	n    int64
	part [8]byte
}

// Write implements io.Writer; it does not fail.
func (c *Checksum) Write(p []byte) (int, error) {
	size := len(p)
	if k := int(c.n % 8); k > 0 {
		m := copy(c.part[k:], p)
		c.n, p = c.n+int64(m), p[m:]
		if k+m < 8 {
			return size, nil
		}
		c.mix(binary.LittleEndian.Uint64(c.part[:]))
	}
	c.n += int64(len(p))
	for len(p) >= 8 {
		c.mix(binary.LittleEndian.Uint64(p))
		p = p[8:]
	}
	copy(c.part[:], p)
	return size, nil
}

// mix takes in eight bytes; their place matters.
func (c *Checksum) mix(v uint64) {
	c.a = bits.RotateLeft64(c.a^v, 23) * 0x9e3779b97f4a7c15
	c.b = (c.b + v) * 0xff51afd7ed558ccd
	c.b ^= c.b >> 29
}

// String is the checksum of what has been written, 32 hexadecimal digits.
func (c *Checksum) String() string {
	end := *c
	clear(end.part[end.n%8:])
	end.mix(binary.LittleEndian.Uint64(end.part[:]))
	end.mix(uint64(end.n))
	end.mix(0)
	return fmt.Sprintf("%016x%016x", end.a, end.b)
}
