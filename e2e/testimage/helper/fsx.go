// SPDX-License-Identifier: Apache-2.0
// Copyright The containerd-cloudhv Authors

package main

import (
	"bytes"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"strconv"

	"golang.org/x/sys/unix"

	"github.com/cloudhv/containerd-cloudhv/e2e/testimage/pattern"
)

// exercise is what the tests of file systems call fsx: one file that is read, written, mapped,
// cut and grown at random, with a copy in memory that it must never differ from. The
// operations come from a seed.
type exercise struct {
	path string
	f    *os.File
	rng  *rand.Rand
	// want is what the file has.
	want []byte
	// did are the last operations, for who has to find out.
	did []string
}

// exerciseBytes is the longest that the file gets.
const exerciseBytes = 256 << 10

// fsx does so many random operations on a file, and prints what it has at the end.
func fsx(args []string) (int, error) {
	if len(args) != 3 {
		return 64, errors.New("want a file, a number of operations and a seed")
	}
	count, seed, err := twoNumbers(args[1:])
	if err != nil {
		return 64, err
	}
	x := &exercise{path: args[0], rng: rand.New(rand.NewPCG(seed, 0))}
	if x.f, err = os.OpenFile(x.path, os.O_RDWR|os.O_CREATE|os.O_TRUNC, 0o644); err != nil {
		return 1, err
	}
	defer func() { _ = x.f.Close() }()
	for i := range count {
		if err := x.step(); err != nil {
			return 1, fmt.Errorf("operation %d of seed %d: %w\nbefore it: %v", i, seed, err, x.did)
		}
	}
	if err := errors.Join(x.readAll(), x.f.Sync()); err != nil {
		return 1, err
	}
	sum, err := pattern.Digest(bytes.NewReader(x.want))
	fmt.Println(sum)
	return 0, err
}

// step does one operation.
func (x *exercise) step() error {
	offset := x.rng.IntN(exerciseBytes)
	size := 1 + x.rng.IntN(16<<10)
	ops := []struct {
		name string
		run  func(offset, size int) error
	}{
		{"write", x.write}, {"write", x.write}, {"read", x.read}, {"read", x.read},
		{"map-write", x.mapWrite}, {"map-read", x.mapRead}, {"truncate", x.truncate}, {"reopen", x.reopen}, {"append", x.append},
	}
	op := ops[x.rng.IntN(len(ops))]
	said := op.name + " " + strconv.Itoa(offset) + "+" + strconv.Itoa(size)
	err := op.run(offset, size)
	if err != nil {
		return fmt.Errorf("%s: %w", said, err)
	}
	if x.did = append(x.did, said); len(x.did) > 20 {
		x.did = x.did[1:]
	}
	info, err := x.f.Stat()
	if err == nil && info.Size() != int64(len(x.want)) {
		err = fmt.Errorf("%s: the file has %d bytes, want %d", said, info.Size(), len(x.want))
	}
	return err
}

// random are bytes that have not been there before.
func (x *exercise) random(size int) []byte {
	p := make([]byte, size)
	for i := range p {
		p[i] = byte(x.rng.Uint32())
	}
	return p
}

// put notes that bytes were written; what lies between the end and them is zero.
func (x *exercise) put(offset int, p []byte) {
	if end := offset + len(p); end > len(x.want) {
		x.want = append(x.want, make([]byte, end-len(x.want))...)
	}
	copy(x.want[offset:], p)
}

// piece cuts offset and size to what the file has.
func (x *exercise) piece(offset, size int) (from, to int) {
	from = min(offset, len(x.want))
	return from, min(from+size, len(x.want))
}

func (x *exercise) write(offset, size int) error {
	p := x.random(min(size, exerciseBytes-offset))
	if _, err := x.f.WriteAt(p, int64(offset)); err != nil {
		return err
	}
	x.put(offset, p)
	return nil
}

func (x *exercise) append(_, size int) error {
	offset := len(x.want)
	if offset+size > exerciseBytes {
		return nil
	}
	f, err := os.OpenFile(x.path, os.O_WRONLY|os.O_APPEND, 0)
	if err != nil {
		return err
	}
	p := x.random(size)
	_, err = f.Write(p)
	x.put(offset, p)
	return errors.Join(err, f.Close())
}

func (x *exercise) read(offset, size int) error {
	from, to := x.piece(offset, size)
	p := make([]byte, to-from)
	if _, err := x.f.ReadAt(p, int64(from)); err != nil {
		return err
	}
	return differ(p, x.want[from:to], from)
}

func (x *exercise) readAll() error { return x.read(0, len(x.want)) }

// truncate cuts the file, or grows it by a little.
func (x *exercise) truncate(offset, size int) error {
	to := offset
	if to > len(x.want) {
		to = min(len(x.want)+size, exerciseBytes)
	}
	if err := x.f.Truncate(int64(to)); err != nil {
		return err
	}
	if to > len(x.want) {
		x.want = append(x.want, make([]byte, to-len(x.want))...)
	}
	x.want = x.want[:to:to]
	return nil
}

// reopen closes the file, at times after it has reached the disk.
func (x *exercise) reopen(offset, _ int) error {
	if offset%2 == 0 {
		if err := x.f.Sync(); err != nil {
			return err
		}
	}
	if err := x.f.Close(); err != nil {
		return err
	}
	var err error
	x.f, err = os.OpenFile(x.path, os.O_RDWR, 0)
	return err
}

// mapped runs with the file mapped as a whole.
func (x *exercise) mapped(run func(p []byte) error) error {
	if len(x.want) == 0 {
		return nil
	}
	p, err := unix.Mmap(int(x.f.Fd()), 0, len(x.want), unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED)
	if err != nil {
		return fmt.Errorf("mmap: %w", err)
	}
	return errors.Join(run(p), unix.Munmap(p))
}

func (x *exercise) mapRead(offset, size int) error {
	from, to := x.piece(offset, size)
	return x.mapped(func(p []byte) error { return differ(p[from:to], x.want[from:to], from) })
}

// mapWrite writes through a mapping; what is read next by the file's descriptor has it.
func (x *exercise) mapWrite(offset, size int) error {
	from, to := x.piece(offset, size)
	return x.mapped(func(p []byte) error {
		copy(p[from:to], x.random(to-from))
		copy(x.want[from:to], p[from:to])
		if from%2 == 0 {
			return unix.Msync(p, unix.MS_SYNC)
		}
		return nil
	})
}

// differ is an error that says where two pieces of the file differ.
func differ(got, want []byte, from int) error {
	for i := range want {
		if got[i] != want[i] {
			return fmt.Errorf("at %d of the file is %#x, want %#x", from+i, got[i], want[i])
		}
	}
	return nil
}
