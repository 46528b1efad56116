// SPDX-License-Identifier: Apache-2.0
// Copyright The containerd-cloudhv Authors

package cloudhypervisor

// Requests and answers of the API, as far as they are used. A test compares their
// fields with the hypervisor's own description.

// diskConfig is the body of vm.add-disk.
type diskConfig struct {
	ID        string `json:"id"`
	Path      string `json:"path"`
	ReadOnly  bool   `json:"readonly"`
	Serial    string `json:"serial"`
	ImageType string `json:"image_type"`
	// Sparse lets the guest punch holes.
	Sparse bool `json:"sparse"`
}

// imageRaw is diskConfig.ImageType of all disks: nothing is guessed from their content.
const imageRaw = "Raw"

// netConfig is the body of vm.add-net. The TAP's files come beside it.
type netConfig struct {
	ID     string `json:"id"`
	MAC    string `json:"mac"`
	Queues int    `json:"num_queues"`
}

// removeDevice is the body of vm.remove-device.
type removeDevice struct {
	ID string `json:"id"`
}

// resizeVM is the body of vm.resize.
type resizeVM struct {
	VCPUs int `json:"desired_vcpus"`
}

// resizeZone is the body of vm.resize-zone.
type resizeZone struct {
	ID    string `json:"id"`
	Bytes int64  `json:"desired_ram"`
}

// snapshotConfig is the body of vm.snapshot.
type snapshotConfig struct {
	URL string `json:"destination_url"`
}

// States in vmInfo.
const (
	stateRunning = "Running"
	statePaused  = "Paused"
)

// vmInfo is the answer to vm.info.
type vmInfo struct {
	Config vmConfig `json:"config"`
	State  string   `json:"state"`
	// Memory is what the machine has, in bytes: what it booted with and what is plugged.
	Memory int64 `json:"memory_actual_size"`
	// Devices are all that there are, also those that the guest is to give back.
	Devices map[string]deviceNode `json:"device_tree"`
}

type vmConfig struct {
	CPUs   cpusConfig   `json:"cpus"`
	Memory memoryConfig `json:"memory"`
}

type cpusConfig struct {
	Boot int `json:"boot_vcpus"`
}

type memoryConfig struct {
	Zones []zoneConfig `json:"zones"`
}

type zoneConfig struct {
	ID   string `json:"id"`
	Size int64  `json:"size"`
	// Plugged is how many bytes the guest is to have plugged.
	Plugged int64 `json:"hotplugged_size"`
}

type deviceNode struct {
	// Address on the PCI bus; none for what is behind another device.
	Address any `json:"pci_bdf"`
}
