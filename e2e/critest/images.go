// SPDX-License-Identifier: Apache-2.0
// Copyright The containerd-cloudhv Authors

package main

import (
	"context"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"slices"

	"github.com/cloudhv/containerd-cloudhv/e2e/testimage"
	"github.com/cloudhv/containerd-cloudhv/e2e/testregistry"
)

// images fills a registry with images for the suite. It is nil if the real ones are wanted.
func images(ctx context.Context, o options) (*testregistry.Registry, error) {
	if o.realImages {
		return nil, nil
	}
	repo, err := os.Getwd()
	if err != nil {
		return nil, err
	}
	euid, err := testimage.BuildEUID(repo, o.out)
	if err != nil {
		return nil, err
	}
	packages, err := filepath.Abs(o.packages)
	if err != nil {
		return nil, err
	}
	imgs, err := testimage.CRISuite(packages, euid)
	if err != nil {
		return nil, fmt.Errorf("making the suite's images: %w", err)
	}
	r := testregistry.Start()
	for _, ref := range slices.Sorted(maps.Keys(imgs)) {
		if err := r.Push(ctx, ref, imgs[ref]); err != nil {
			r.Close()
			return nil, err
		}
	}
	return r, nil
}

// mirrors are those that lead to the registry, if there is one.
func mirrors(r *testregistry.Registry) map[string]string {
	m := map[string]string{}
	for _, host := range testimage.CRISuiteHosts {
		if r != nil {
			m[host] = r.URL()
		}
	}
	return m
}
