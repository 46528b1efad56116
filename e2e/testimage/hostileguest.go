// SPDX-License-Identifier: Apache-2.0
// Copyright The containerd-cloudhv Authors

package testimage

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
)

// HostileGuest makes an image for VMs in which a program that means harm may take the
// agent's place: package hostile says when. The rest is from guestDir, where the agent
// and crun are. The image is path; dir is for what is in between.
func HostileGuest(repo, guestDir, dir, path string) (retErr error) {
	program, err := buildGo("hostile", repo, dir)
	if err != nil {
		return err
	}
	root, err := os.MkdirTemp(dir, "hostile")
	if err != nil {
		return err
	}
	defer func() { retErr = errors.Join(retErr, os.RemoveAll(root)) }()
	for _, d := range []string{"bin", "dev", "etc", "mnt", "proc", "run", "sbin", "sys", "tmp"} {
		if err := os.Mkdir(filepath.Join(root, d), 0o755); err != nil {
			return err
		}
	}
	for name, from := range map[string]string{"agent": "agent", "bin/crun": "crun"} {
		data, err := os.ReadFile(filepath.Join(guestDir, from))
		if err != nil {
			return err
		}
		if err := os.WriteFile(filepath.Join(root, name), data, 0o755); err != nil {
			return err
		}
	}
	for name, text := range map[string]string{
		"etc/machine-id": "", "etc/group": "root:x:0:\n", "etc/passwd": "root:x:0:0:root:/:/bin/false\n",
	} {
		if err := os.WriteFile(filepath.Join(root, name), []byte(text), 0o644); err != nil {
			return err
		}
	}
	if err := os.WriteFile(filepath.Join(root, "init"), program, 0o755); err != nil {
		return err
	}
	if err := os.Chmod(root, 0o755); err != nil {
		return err
	}
	if out, err := exec.Command("mkfs.erofs", "--all-root", path, root).CombinedOutput(); err != nil {
		return fmt.Errorf("making the hostile guest's image: %w\n%s", err, out)
	}
	return nil
}
