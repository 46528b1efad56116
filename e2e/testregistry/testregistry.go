// SPDX-License-Identifier: Apache-2.0
// Copyright The containerd-cloudhv Authors

// Package testregistry is an image registry in memory, on the loopback interface.
package testregistry

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"log"
	"net/http"
	"net/http/httptest"
	"strings"

	"github.com/containerd/errdefs"
	"github.com/google/go-containerregistry/pkg/name"
	"github.com/google/go-containerregistry/pkg/registry"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/partial"
)

// Registry serves images by HTTP until Close. Its methods may be called concurrently.
type Registry struct {
	server *httptest.Server
}

// Start starts a registry without images.
func Start() *Registry {
	return &Registry{server: httptest.NewServer(registry.New(registry.Logger(log.New(io.Discard, "", 0))))}
}

// URL is the registry's, without a path.
func (r *Registry) URL() string { return r.server.URL }

// Address is its host and port, as references have it.
func (r *Registry) Address() string { return strings.TrimPrefix(r.server.URL, "http://") }

// Disconnect closes the connections that clients have, as they keep theirs for a while.
func (r *Registry) Disconnect() { r.server.CloseClientConnections() }

// Close ends the registry and its connections.
func (r *Registry) Close() { r.server.Close() }

// Push puts an image into the registry under the reference's repository and tag,
// whatever host the reference names.
func (r *Registry) Push(ctx context.Context, ref string, img v1.Image) error {
	tag, err := name.NewTag(ref)
	if err != nil {
		return fmt.Errorf("reference %q: %w: %w", ref, err, errdefs.ErrInvalidArgument)
	}
	return Push(ctx, r.Address()+"/"+tag.RepositoryStr()+":"+tag.TagStr(), img)
}

// Push puts an image into the registry that the reference names, by HTTP.
func Push(ctx context.Context, ref string, img v1.Image) error {
	tag, err := name.NewTag(ref, name.Insecure)
	if err != nil {
		return fmt.Errorf("reference %q: %w: %w", ref, err, errdefs.ErrInvalidArgument)
	}
	base := "http://" + tag.RegistryStr() + "/v2/" + tag.RepositoryStr()
	layers, err := img.Layers()
	if err != nil {
		return err
	}
	config, err := partial.ConfigLayer(img)
	if err != nil {
		return err
	}
	for _, l := range append(layers, config) {
		if err := pushLayer(ctx, base, l); err != nil {
			return fmt.Errorf("pushing %s: %w", ref, err)
		}
	}
	manifest, err := img.RawManifest()
	if err != nil {
		return err
	}
	mediaType, err := img.MediaType()
	if err != nil {
		return err
	}
	if err := send(ctx, http.MethodPut, base+"/manifests/"+tag.TagStr(), string(mediaType), bytes.NewReader(manifest)); err != nil {
		return fmt.Errorf("pushing %s: %w", ref, err)
	}
	return nil
}

func pushLayer(ctx context.Context, base string, l v1.Layer) error {
	digest, err := l.Digest()
	if err != nil {
		return err
	}
	data, err := l.Compressed()
	if err != nil {
		return err
	}
	defer data.Close()
	return send(ctx, http.MethodPost, base+"/blobs/uploads/?digest="+digest.String(), "application/octet-stream", data)
}

func send(ctx context.Context, method, url, mediaType string, body io.Reader) error {
	req, err := http.NewRequestWithContext(ctx, method, url, body)
	if err != nil {
		return err
	}
	req.Header.Set("Content-Type", mediaType)
	resp, err := http.DefaultClient.Do(req)
	if err != nil {
		return err
	}
	defer resp.Body.Close()
	if resp.StatusCode != http.StatusCreated {
		return fmt.Errorf("%s %s: %s: %w", method, url, resp.Status, errdefs.ErrUnavailable)
	}
	return nil
}
