// SPDX-License-Identifier: Apache-2.0
// Copyright The containerd-cloudhv Authors

package main

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"strings"

	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/cloudhv/containerd-cloudhv/controller/shim"
	wirev1 "github.com/cloudhv/containerd-cloudhv/controller/shim/wire/v1"
)

// printDelete answers containerd's question how a container ended whose shim it
// has lost, or whose task it has just deleted: then it does not use the answer.
// A container is gone with its pod's VM, which is the controller's, so there is
// nothing to remove here, and a pod that lives is not touched.
func printDelete(opts *options, stdout io.Writer) error {
	bundle := opts.bundle
	if bundle == "" {
		var err error
		if bundle, err = os.Getwd(); err != nil {
			return err
		}
	}
	status := uint32(shim.StatusUnknown)
	lost, err := vmLost(bundle)
	if err != nil {
		// Without an answer containerd would keep the bundle.
		_, _ = fmt.Fprintf(os.Stderr, "container %s: why it ended is not known: %v\n", opts.id, err)
	}
	if lost {
		status = shim.StatusVMLost
	}
	data, err := proto.Marshal(&wirev1.DeleteResponse{ExitStatus: status, ExitedAt: timestamppb.Now()})
	if err != nil {
		return err
	}
	_, err = stdout.Write(data)
	return err
}

// vmLost tells whether the shim of the bundle's pod had noted that its VM is lost.
func vmLost(bundle string) (bool, error) {
	id, err := os.ReadFile(filepath.Join(bundle, "sandbox"))
	if err != nil {
		if errors.Is(err, fs.ErrNotExist) {
			return false, nil
		}
		return false, err
	}
	data, err := os.ReadFile(filepath.Join(bundle, "bootstrap.json"))
	if err != nil {
		if errors.Is(err, fs.ErrNotExist) {
			return false, nil
		}
		return false, err
	}
	var bootstrap struct {
		Address string `json:"address"`
	}
	if err := json.Unmarshal(data, &bootstrap); err != nil {
		return false, fmt.Errorf("bootstrap.json: %w", err)
	}
	dir := filepath.Dir(strings.TrimPrefix(bootstrap.Address, "unix://"))
	if filepath.Base(dir) != string(id) {
		return false, fmt.Errorf("bootstrap.json names %q, which is not of sandbox %q", bootstrap.Address, id)
	}
	switch _, err := os.Stat(filepath.Join(dir, shim.VMLostFile)); {
	case err == nil:
		return true, nil
	case errors.Is(err, fs.ErrNotExist):
		return false, nil
	default:
		return false, err
	}
}
