// SPDX-License-Identifier: Apache-2.0
// Copyright The containerd-cloudhv Authors

package testimage

import (
	"archive/tar"
	"bytes"
	"errors"
	"fmt"
	"path"
	"runtime"
	"time"
)

func arch() string { return runtime.GOARCH }

// archive collects the entries of a layer. The first error is kept.
type archive struct {
	buf bytes.Buffer
	w   *tar.Writer
	err error
	// files are the headers of what a hard link may point to.
	files map[string]tar.Header
}

func newArchive() *archive {
	a := &archive{files: map[string]tar.Header{}}
	a.w = tar.NewWriter(&a.buf)
	return a
}

// bytes closes the archive.
func (a *archive) bytes() ([]byte, error) {
	if err := errors.Join(a.err, a.w.Close()); err != nil {
		return nil, fmt.Errorf("writing a layer: %w", err)
	}
	return a.buf.Bytes(), nil
}

// add writes one entry; options change its header.
func (a *archive) add(hdr tar.Header, data []byte, opts ...option) {
	if a.err != nil {
		return
	}
	hdr.ModTime, hdr.Format, hdr.Size = epoch, tar.FormatPAX, int64(len(data))
	for _, o := range opts {
		o(&hdr)
	}
	if a.err = a.w.WriteHeader(&hdr); a.err == nil {
		_, a.err = a.w.Write(data)
	}
	a.files[hdr.Name] = hdr
	if a.err != nil {
		a.err = fmt.Errorf("%q: %w", hdr.Name, a.err)
	}
}

func (a *archive) dir(name string, mode int64, opts ...option) {
	a.add(tar.Header{Typeflag: tar.TypeDir, Name: name + "/", Mode: mode}, nil, opts...)
}

func (a *archive) file(name string, mode int64, data []byte, opts ...option) {
	a.add(tar.Header{Typeflag: tar.TypeReg, Name: name, Mode: mode}, data, opts...)
}

func (a *archive) symlink(name, target string, opts ...option) {
	a.add(tar.Header{Typeflag: tar.TypeSymlink, Name: name, Linkname: target, Mode: 0o777}, nil, opts...)
}

// hardLink makes name the same file as target, which is in this layer. Whoever
// unpacks it sets mode, owner and the like once more, so they are repeated.
func (a *archive) hardLink(name, target string) {
	hdr, ok := a.files[target]
	if !ok && a.err == nil {
		a.err = fmt.Errorf("%q links to %q, which is not there", name, target)
	}
	hdr.Typeflag, hdr.Name, hdr.Linkname = tar.TypeLink, name, target
	a.add(hdr, nil, func(h *tar.Header) { h.ModTime = hdr.ModTime })
}

func (a *archive) node(name string, typ byte, major, minor, mode int64) {
	a.add(tar.Header{Typeflag: typ, Name: name, Devmajor: major, Devminor: minor, Mode: mode}, nil)
}

// whiteout removes what lower layers have under name.
func (a *archive) whiteout(name string) {
	dir, base := path.Split(name)
	a.file(dir+".wh."+base, 0, nil)
}

// opaque hides what lower layers have in the directory.
func (a *archive) opaque(dir string) { a.file(dir+"/.wh..wh..opq", 0, nil) }

// option changes an entry.
type option func(*tar.Header)

func owner(uid, gid int) option {
	return func(h *tar.Header) { h.Uid, h.Gid = uid, gid }
}

func modified(t time.Time) option { return func(h *tar.Header) { h.ModTime = t } }

func xattr(name, value string) option {
	return func(h *tar.Header) {
		if h.PAXRecords == nil {
			h.PAXRecords = map[string]string{}
		}
		h.PAXRecords["SCHILY.xattr."+name] = value
	}
}
