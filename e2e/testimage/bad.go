// SPDX-License-Identifier: Apache-2.0
// Copyright The containerd-cloudhv Authors

package testimage

import (
	"archive/tar"

	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/mutate"
	"github.com/google/go-containerregistry/pkg/v1/static"
	"github.com/google/go-containerregistry/pkg/v1/types"
)

// BrokenLayers are layers that are no archives, by what is wrong with them.
func BrokenLayers() map[string]v1.Layer {
	good := newArchive()
	good.file("file", 0o644, make([]byte, 4096))
	b, err := good.bytes()
	if err != nil {
		b = nil // cannot be: it is written into memory
	}
	return map[string]v1.Layer{
		"noise":     static.NewLayer([]byte("this is no archive, whatever its type says, and is longer than nothing"), types.OCIUncompressedLayer),
		"truncated": static.NewLayer(b[:min(len(b), 1024)], types.OCIUncompressedLayer),
	}
}

// EscapingLayer is a layer whose paths and links lead out of the root file system, one
// of them to the host's file secret.
func EscapingLayer(secret string) (v1.Layer, error) {
	a := newArchive()
	a.file("../../climbed", 0o644, []byte("climbed\n"))
	a.symlink("to-host", "../../../../../../../.."+secret)
	a.symlink("link", "/outside-of-image")
	a.symlink("in-link", "../../../../tmp/outside-of-image")
	a.add(tar.Header{Typeflag: tar.TypeReg, Name: "in-link/file", Mode: 0o644}, []byte("through a link\n"))
	a.symlink("work-link", "../../../../tmp/outside-of-image/work")
	b, err := a.bytes()
	if err != nil {
		return nil, err
	}
	return static.NewLayer(b, types.OCIUncompressedLayer), nil
}

// WithLayer is Helper with one layer more.
func WithLayer(helper []byte, layer v1.Layer) (v1.Image, error) {
	img, err := Helper(helper)
	if err != nil {
		return nil, err
	}
	return mutate.AppendLayers(img, layer)
}
