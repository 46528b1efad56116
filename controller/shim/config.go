// SPDX-License-Identifier: Apache-2.0
// Copyright The containerd-cloudhv Authors

package shim

import "github.com/cloudhv/containerd-cloudhv/controller/directvolume"

// Config is what the controller hands to a pod's shim, as JSON in a file of the
// sandbox's directory. The shim is started as
//
//	containerd-shim-cloudhv-v1 -sandbox DIR
//
// with DIR the directory of ConfigFile, the listening socket of its Task API as
// file descriptor ListenFD, and the listeners of Forwards after it. Standard output and
// error are its log.
type Config struct {
	// SandboxID is the pod's, Namespace containerd's for it.
	SandboxID string `json:"sandbox_id"`
	Namespace string `json:"namespace"`
	// SandboxPid is the pid that the controller gave to CRI: a namespace path
	// /proc/SandboxPid/ns/… in a spec means the pod's own.
	SandboxPid uint32 `json:"sandbox_pid"`
	// GuestEndpoint is vmm.VM.PodEndpoint.
	GuestEndpoint string `json:"guest_endpoint"`
	// TTRPCAddress is containerd's ttrpc socket, for events and the host service.
	TTRPCAddress string `json:"ttrpc_address"`
	// Forwards is how many listeners the shim has for port-forwards: TCP sockets to which
	// the connections to any port are redirected.
	Forwards int `json:"forwards,omitempty"`
	// PodUID is what Kubernetes knows the pod by, and DirectVolumes are the pod's.
	PodUID        string                `json:"pod_uid,omitempty"`
	DirectVolumes []directvolume.Volume `json:"direct_volumes,omitempty"`
	// Debug logs every request.
	Debug bool `json:"debug,omitempty"`
}

const (
	// ConfigFile is the name of the file that holds Config.
	ConfigFile = "shim.json"
	// LogFile is where the controller sends the shim's standard error.
	LogFile = "shim.log"
	// OldLogFile is where the shim keeps what LogFile held before.
	OldLogFile = LogFile + ".1"
	// SocketFile is the shim's Task API socket in the sandbox's directory.
	SocketFile = "task.sock"
	// ListenFD is the file descriptor of the listening socket.
	ListenFD = 3
)
