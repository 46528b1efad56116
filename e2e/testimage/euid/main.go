// SPDX-License-Identifier: Apache-2.0
// Copyright The containerd-cloudhv Authors

// Command euid prints whose rights it has. In an image it is a setuid program of root's.
package main

import (
	"fmt"
	"os"
)

func main() {
	fmt.Println("Effective uid:", os.Geteuid())
}
