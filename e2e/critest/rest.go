// SPDX-License-Identifier: Apache-2.0
// Copyright The containerd-cloudhv Authors

package main

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"strings"
	"time"

	"github.com/containerd/errdefs"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/cloudhv/containerd-cloudhv/e2e/testimage"
	"github.com/cloudhv/containerd-cloudhv/e2e/testnode"
)

// warmUpRef is an image that stays, and what all such images' names begin with.
const (
	ownImages = "localhost/chv/"
	warmUpRef = ownImages + "warm-up:latest"
)

// warmUp runs one pod by each handler and waits for the snapshot that later VMs are
// restored from, so that what a node makes once does not show in the census.
func warmUp(ctx context.Context, n *testnode.Node) error {
	img, err := testimage.Pause()
	if err != nil {
		return err
	}
	if err := n.Import(ctx, warmUpRef, img); err != nil {
		return err
	}
	for _, h := range []string{testnode.RunC, testnode.CloudHV} {
		pod := n.PodConfig("warm-up")
		id, err := n.RunPod(ctx, pod, h)
		if err != nil {
			return err
		}
		c, err := n.CreateContainer(ctx, id, pod, testnode.ContainerConfig("warm-up", warmUpRef))
		if err == nil {
			err = n.StartContainer(ctx, c)
		}
		if err := errors.Join(err, n.StopPod(ctx, id), n.RemovePod(ctx, id)); err != nil {
			return err
		}
	}
	ctx, cancel := context.WithTimeout(ctx, testnode.Scale(5*time.Minute))
	defer cancel()
	return n.AwaitSnapshot(ctx)
}

// census is the node's, without what grows with the images that were seen, by design.
func census(ctx context.Context, n *testnode.Node) (testnode.Census, error) {
	c, err := n.Census(ctx)
	maps.DeleteFunc(c.Items, func(item string, _ int) bool { return strings.Contains(item, " cache/images/") })
	return c, err
}

// leftBehind compares the node with what it was before the suite, after removing
// the images that the suite has pulled, the pods of specs that failed, and what was
// mounted for volumes: the suite does not see to that where a pod is refused.
func leftBehind(ctx context.Context, n *testnode.Node, before testnode.Census) error {
	if err := errors.Join(n.RemoveAllPods(ctx), testnode.UnmountBelow(workDir(n))); err != nil {
		return err
	}
	images, err := n.ImageService().ListImages(ctx, &runtimeapi.ListImagesRequest{})
	if err != nil {
		return fmt.Errorf("listing images: %w", err)
	}
	for _, img := range images.GetImages() {
		if strings.HasPrefix(strings.Join(img.GetRepoTags(), " "), ownImages) {
			continue
		}
		if _, err := n.ImageService().RemoveImage(ctx, &runtimeapi.RemoveImageRequest{Image: &runtimeapi.ImageSpec{Image: img.GetId()}}); err != nil {
			return fmt.Errorf("removing image %v: %w", img.GetRepoTags(), err)
		}
	}
	ctx, cancel := context.WithTimeout(ctx, testnode.Scale(settleLimit))
	defer cancel()
	return testnode.Eventually(ctx, func(ctx context.Context) error {
		now, err := census(ctx, n)
		if err != nil {
			return err
		}
		if d := now.Diff(before); len(d) > 0 {
			return fmt.Errorf("the census differs:\n\t%s: %w", strings.Join(d, "\n\t"), errdefs.ErrFailedPrecondition)
		}
		return nil
	})
}

// settleLimit is how long may take what is cleaned up after a call has returned.
const settleLimit = 30 * time.Second
