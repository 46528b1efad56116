// SPDX-License-Identifier: Apache-2.0
// Copyright The containerd-cloudhv Authors

package testnode

import (
	"context"
	"errors"
	"fmt"
	"io"

	containerd "github.com/containerd/containerd/v2/client"
	"github.com/containerd/errdefs"
	"github.com/google/go-containerregistry/pkg/name"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/tarball"
	"google.golang.org/grpc"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/cloudhv/containerd-cloudhv/e2e/testimage"
)

// Import brings an image that was made in process into containerd under the
// given reference, unpacked and pinned against garbage collection by CRI.
func (n *Node) Import(ctx context.Context, ref string, img v1.Image) error {
	return n.importImage(ctx, n.client(), n.Containerd(), ref, img)
}

func (n *Node) importImage(ctx context.Context, conn *grpc.ClientConn, client *containerd.Client, ref string, img v1.Image) error {
	tag, err := name.NewTag(ref, name.WithDefaultRegistry("localhost"))
	if err != nil {
		return fmt.Errorf("reference %q: %w: %w", ref, err, errdefs.ErrInvalidArgument)
	}
	pr, pw := io.Pipe()
	go func() { pw.CloseWithError(tarball.Write(tag, img, pw)) }()
	defer pr.Close()
	labels := map[string]string{"io.cri-containerd.image": "managed", "io.cri-containerd.pinned": "pinned"}
	imgs, err := client.Import(n.Context(ctx), pr, containerd.WithImageLabels(labels))
	if err != nil {
		return fmt.Errorf("importing %s: %w", ref, err)
	}
	var errs []error
	for _, i := range imgs {
		errs = append(errs, containerd.NewImage(client, i).Unpack(n.Context(ctx), "overlayfs"))
	}
	if err := errors.Join(errs...); err != nil {
		return fmt.Errorf("unpacking %s: %w", ref, err)
	}
	return awaitImage(ctx, conn, ref)
}

// awaitImage returns when CRI knows the image: it learns of imports by an event.
func awaitImage(ctx context.Context, conn *grpc.ClientConn, ref string) error {
	ctx, cancel := limited(ctx)
	defer cancel()
	images := runtimeapi.NewImageServiceClient(conn)
	return Eventually(ctx, func(ctx context.Context) error {
		r, err := images.ImageStatus(ctx, &runtimeapi.ImageStatusRequest{Image: &runtimeapi.ImageSpec{Image: ref}})
		if err != nil {
			return err
		}
		if r.GetImage() == nil {
			return fmt.Errorf("image %s in CRI: %w", ref, errdefs.ErrNotFound)
		}
		return nil
	})
}

// Pull pulls an image through CRI and returns the reference to use.
func (n *Node) Pull(ctx context.Context, ref string) (string, error) {
	r, err := n.ImageService().PullImage(ctx, &runtimeapi.PullImageRequest{Image: &runtimeapi.ImageSpec{Image: ref}})
	if err != nil {
		return "", fmt.Errorf("pulling %s: %w", ref, err)
	}
	return r.GetImageRef(), nil
}

// ensurePause brings in the sandbox image of runc's pods. n.mu is held.
func (n *Node) ensurePause(ctx context.Context) error {
	images := runtimeapi.NewImageServiceClient(n.conn)
	r, err := images.ImageStatus(ctx, &runtimeapi.ImageStatusRequest{Image: &runtimeapi.ImageSpec{Image: PauseRef}})
	if err != nil {
		return fmt.Errorf("asking for image %s: %w", PauseRef, err)
	}
	if r.GetImage() != nil {
		return nil
	}
	img, err := testimage.Pause()
	if err != nil {
		return err
	}
	return n.importImage(ctx, n.conn, n.ctrd, PauseRef, img)
}
