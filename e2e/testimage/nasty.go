// SPDX-License-Identifier: Apache-2.0
// Copyright The containerd-cloudhv Authors

package testimage

import (
	"archive/tar"
	"fmt"
	"io"
	"strings"
	"time"

	v1 "github.com/google/go-containerregistry/pkg/v1"

	"github.com/cloudhv/containerd-cloudhv/e2e/testimage/pattern"
)

// SmallFiles is how many small files Nasty has, before later layers take away
// some 1,500 of them.
const SmallFiles = 22_000

// netRaw is the security.capability attribute (version 2) of a program that has
// CAP_NET_RAW, effective and permitted.
const netRaw = "\x01\x00\x00\x02\x00\x20\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00"

// Nasty is Helper and everything that makes a root file system hard to carry
// over unharmed, in four more layers.
func Nasty(helper []byte) (v1.Image, error) {
	base, err := busyboxLayer()
	if err != nil {
		return nil, err
	}
	prog := newArchive()
	prog.file("bin/helper", 0o755, helper)
	return build([]*archive{base, prog, first(), many(), second(), third()}, v1.Config{Cmd: []string{HelperPath}})
}

// first is where the odd files are, and what later layers take away.
func first() *archive {
	a := newArchive()
	a.dir("n", 0o755)
	modes(a)
	names(a)
	attributes(a)
	contents(a)
	a.dir("n/dev", 0o755)
	a.node("n/dev/null", tar.TypeChar, 1, 3, 0o666)
	a.node("n/dev/high", tar.TypeChar, 4095, 300, 0o600)
	a.node("n/dev/block", tar.TypeBlock, 7, 70000, 0o660)
	a.node("n/dev/fifo", tar.TypeFifo, 0, 0, 0o622)
	a.dir("n/links", 0o755)
	a.symlink("n/links/self", "self")
	a.symlink("n/links/a", "b")
	a.symlink("n/links/b", "a")
	a.symlink("n/links/up", "../../n/links")
	a.symlink("n/links/dangling", "/does/not/exist")
	a.symlink("n/links/long", strings.Repeat("../links/", 300)+"self", owner(1000, 1000))
	a.file("n/links/one", 0o640, []byte("linked\n"), owner(5, 6), xattr("user.hard", "yes"))
	a.hardLink("n/links/two", "n/links/one")
	a.dir("n/links/sub", 0o755)
	a.hardLink("n/links/sub/three", "n/links/one")
	a.hardLink("n/links/symlink-again", "n/links/dangling")
	a.hardLink("n/dev/fifo-again", "n/dev/fifo")
	// What the layers above change.
	for _, d := range []string{"gone", "opaque", "replaced", "kept", "opaque/sub", "kept/sub"} {
		a.dir("n/"+d, 0o755)
		a.file("n/"+d+"/file", 0o644, []byte("lower "+d+"\n"))
	}
	a.file("n/removed", 0o644, []byte("removed\n"))
	a.file("n/to-dir", 0o644, []byte("a file\n"))
	a.dir("n/to-link", 0o755)
	a.file("n/to-link/inside", 0o644, []byte("inside\n"))
	a.file("n/pair-a", 0o644, []byte("pair\n"))
	a.hardLink("n/pair-b", "n/pair-a")
	a.file("n/.hidden", 0o600, []byte("hidden\n"))
	return a
}

func modes(a *archive) {
	a.dir("n/modes", 0o755)
	for _, m := range []int64{0, 0o200, 0o444, 0o755, 0o4755, 0o2755, 0o6755, 0o1644, 0o7777} {
		a.file(fmt.Sprintf("n/modes/f%04o", m), m, []byte("x"), owner(int(m), 1000))
		a.dir(fmt.Sprintf("n/modes/d%04o", m), m, owner(1000, int(m)))
	}
	a.file("n/modes/large-ids", 0o644, nil, owner(4_000_000_000, 3_000_000_000))
	a.file("n/modes/old", 0o644, nil, modified(time.Unix(-86400, 5)))
	a.file("n/modes/future", 0o644, nil, modified(time.Unix(5_000_000_000, 123_456_789)))
}

func names(a *archive) {
	a.dir("n/names", 0o755)
	for _, n := range []string{"new\nline", "tab\there", "two  spaces", " leading", "trailing ", "-dash", "*?[x]", `back\slash`, `"quoted"`, "'single'",
		"ünïcödé", "日本語", "invalid\xff\xfeutf8", "\x01\x1b[31m", strings.Repeat("l", 254), "wh.not", ".wh", "a:b", "%00", "$HOME"} {
		a.file("n/names/"+n, 0o644, []byte(n))
	}
	const levels = 12
	step := "/" + strings.Repeat("d", 200)
	for i := range levels {
		a.dir("n/names"+strings.Repeat(step, i+1), 0o755)
	}
	a.file("n/names"+strings.Repeat(step, levels)+"/bottom", 0o644, []byte("deep\n"))
}

func attributes(a *archive) {
	a.dir("n/xattrs", 0o755, xattr("user.dir", "on a directory"))
	a.file("n/xattrs/capability", 0o755, []byte("#!/bin/sh\n"), xattr("security.capability", netRaw))
	a.file("n/xattrs/several", 0o644, nil, xattr("user.a", "1"), xattr("user.empty", ""), xattr("user.binary", "\x00\x01\xff\n"))
	a.file("n/xattrs/long", 0o644, []byte("x"), xattr("user.long", strings.Repeat("v", 2000)))
	for i := range 40 {
		a.file(fmt.Sprintf("n/xattrs/same%d", i), 0o644, nil, xattr("user.shared", strings.Repeat("s", 100)))
	}
}

func contents(a *archive) {
	a.dir("n/data", 0o755)
	for _, size := range []int64{0, 1, 511, 4095, 4096, 4097, 65_536, 1<<20 + 1} {
		a.file(fmt.Sprintf("n/data/size%d", size), 0o644, data(uint64(size), size))
	}
	a.file("n/data/big", 0o644, data(7, 24<<20))
	sparse := make([]byte, 32<<20)
	copy(sparse[16<<20:], "in the middle")
	a.file("n/data/sparse", 0o644, sparse)
}

func data(seed uint64, size int64) []byte {
	// A pattern cannot fail.
	b, _ := io.ReadAll(pattern.New(seed, size))
	return b
}

// many has the small files, a thousand in each directory.
func many() *archive {
	a := newArchive()
	a.dir("n/many", 0o755)
	for i := range SmallFiles {
		dir := fmt.Sprintf("n/many/%02d", i/1000)
		if i%1000 == 0 {
			a.dir(dir, 0o755)
		}
		a.file(fmt.Sprintf("%s/%05d", dir, i), 0o644, fmt.Appendf(nil, "small file %d\n", i), owner(i%100, i%7))
	}
	return a
}

// second takes away and replaces.
func second() *archive {
	a := newArchive()
	a.whiteout("n/removed")
	a.whiteout("n/gone")
	a.dir("n/opaque", 0o700, owner(1, 2), xattr("user.new", "opaque"))
	a.opaque("n/opaque")
	a.file("n/opaque/new", 0o644, []byte("upper\n"))
	a.file("n/replaced/file", 0o600, []byte("replaced by the second layer\n"), owner(9, 9))
	a.whiteout("n/to-dir")
	a.dir("n/to-dir", 0o755)
	a.file("n/to-dir/inside", 0o644, []byte("now a directory\n"))
	a.whiteout("n/to-link")
	a.symlink("n/to-link", "kept")
	a.whiteout("n/pair-b")
	a.whiteout("n/many/03")
	for i := range 500 {
		a.whiteout(fmt.Sprintf("n/many/04/%05d", 4000+i))
	}
	return a
}

// third links across layers, as an image builder does it: the link's source
// is in the layer again. It also brings back what the second took away.
func third() *archive {
	a := newArchive()
	a.file("n/kept/file", 0o644, []byte("lower kept\n"))
	a.hardLink("n/kept/linked-later", "n/kept/file")
	a.dir("n/gone", 0o711)
	a.file("n/gone/back", 0o644, []byte("back again\n"))
	a.file("n/removed", 0o4755, []byte("another file\n"), owner(1000, 0))
	a.dir("n/opaque/sub", 0o755)
	a.file("n/opaque/sub/only", 0o644, []byte("third\n"))
	return a
}
