// SPDX-License-Identifier: Apache-2.0
// Copyright The containerd-cloudhv Authors

package compat

func tests(names ...string) []string { return names }

var features = Section{
	Title: "Kubernetes pod features",
	Intro: "In the words of a pod's specification.",
	Entries: []Entry{
		{"init, sidecar and several containers", Works, "", tests("TestKindsOfContainers")},
		{"ephemeral containers (kubectl debug)", Works, "with `--target` in the other container's PID namespace", tests("TestEphemeralContainer", "TestInsidePIDNamespaces")},
		{"restart policies, restart counts, exit reasons", Works, "`Completed`, `Error`, `OOMKilled`, `StartError`; a pod whose VM dies is NotReady and its containers end with 137", tests("TestRestarts", "TestExitCodes", "TestOOMOfOne", "TestMissingBinary", "TestVMMKilled")},
		{"kubectl exec, attach, logs", Works, "with terminals, resizing, half-closed input, 50 at once; log lines of any length, rotation", tests("TestExecsAtOnce", "TestHalfClosedInput", "TestTerminal", "TestExecUser", "TestLongLogLines", "TestLogReopened", "TestInput", "TestBinaryStreams")},
		{"kubectl port-forward", Works, "also to services on 127.0.0.1 and ::1 in the VM", tests("TestPortForward", "TestPortForwardInNamespace", "TestPortForwardRestart")},
		{"kubectl cp", Works, "it is tar by exec", tests("TestBinaryStreams")},
		{"preStop and postStart hooks, probes", Works, "by exec; those by HTTP and TCP come from kubelet to the pod's address", tests("TestPreStop", "TestNetwork")},
		{"terminationGracePeriodSeconds", Works, "the stop signal of image or container, then SIGKILL", tests("TestStop", "TestStopSignal", "TestPreStop")},
		{"requests and limits", Works, "of containers inside the VM; those of the pod size the VM (docs/sizing.md)", tests("TestContainerLimits", "TestContainersSizeTheVM", "TestInsideMachine")},
		{"in-place resize", Works, "of containers and of the pod, up and down", tests("TestContainerLimits", "TestResizePod", "TestContainersSizeTheVM", "TestShrinkRefused")},
		{"ephemeral-storage limits", Works, "what a container writes to its root file system is its writable layer's usage; snapshotters that containerd reaches over a socket (proxy plugins) are not measured. The disks of all pods are admitted against `scratch_budget`", tests("TestWritableLayer", "controller:TestScratchBudget")},
		{"metrics (kubectl top)", Works, "containers by their cgroups in the VM; the pod by its cgroup on the host, which has the VMM and the shim", tests("TestContainerStats", "TestPodStats")},
		{"shareProcessNamespace", Works, "process 1 is the agent's stand-in for the pause container", tests("TestSharedProcesses", "TestInsidePIDNamespaces")},
		{"hostNetwork, hostPID, hostIPC", Refused, "the host's namespaces are not in the VM", tests("TestRefusedPods", "TestHostNetwork")},
		{"hostUsers: false (user namespaces)", Works, "one of the pod's in the VM, with the IDs that kubelet gives it, which owns the pod's network, IPC and UTS namespaces; volumes are ID-mapped on the host, so that is what their file system must have, as by runc", tests("TestUserNamespace", "TestUserNamespaceShared", "TestUserNamespaceNetwork", "TestUserNamespaceVolumes", "TestUserNamespaceVolumeGroup", "TestUserNamespaceRestart")},
		{"privileged", InVM, "all capabilities of the VM's kernel and none of the host's devices (`privileged_without_host_devices`)", tests("TestPrivileged", "TestInsidePrivileged")},
		{"runAsUser, runAsGroup, supplementalGroups, supplementalGroupsPolicy", Works, "", tests("TestInsideContainer", "TestSecurityContext")},
		{"capabilities, allowPrivilegeEscalation, readOnlyRootFilesystem", Works, "", tests("TestInsideContainer", "TestSecurityContext")},
		{"seccompProfile", Works, "RuntimeDefault, Unconfined, and Localhost: profiles are read on the host and run in the VM; actions that notify a listener are refused", tests("TestInsideContainer", "TestSecurityContext", "controller/shim/guestspec:TestRefusals")},
		{"appArmorProfile", Partly, "RuntimeDefault and Unconfined are no profile in the VM, whose wall stands in its place; Localhost is refused, as profiles are loaded into the host's kernel only", tests("controller/shim/guestspec:TestEveryField")},
		{"seLinuxOptions", Ignored, "labels are of the host's policy", tests("controller/shim/guestspec:TestEveryField")},
		{"procMount", Works, "Default and Unmasked", tests("TestSecurityContext", "TestInsideContainer")},
		{"sysctls", Works, "those of the network and IPC namespaces; others are refused, as by runc", tests("TestInsideSysctls", "TestRefusedPods")},
		{"hugepages", Refused, "a VM's memory is of the host's ordinary pages, which count against the pod's limit of memory; limits of 0 are none, and `medium: HugePages` is refused", tests("TestHugePages", "controller/shim/guestspec:TestEveryField", "controller/shim/volumes:TestHugePages")},
		{"runtimeClass overhead", Works, "room for the VMM beside the guest's memory", tests("controller:TestSizing")},
		{"DNS policy and options, hostname, hostAliases", Works, "hostAliases come as a mount of /etc/hosts", tests("TestInsideMachine", "TestNetworks", "TestMounts")},
		{"IPv6, dual stack", Works, "one family or both: what CNI gives the pod's interface is what the guest's has", tests("TestInsideNetwork", "TestNetwork", "TestNetworks")},
		{"several interfaces, routes, routing rules, static neighbours, MTUs by CNI", Works, "as in the pod's network namespace when it starts; later changes there, sysctls of the plugin tuning and firewall rules inside the namespace do not reach the VM (networking.md)", tests("TestNetworks", "controller/network:TestReadTables", "guest/agent/network:TestConfigure")},
		{"CNI plugins bandwidth, firewall, portmap, sbr", Works, "on the host's side of the interface, as for runc", tests("TestNetworks")},
		{"hostPort", Host, "by the CNI plugin portmap", tests("TestNetworks")},
		{"emptyDir, hostPath, PVC, ConfigMap, Secret, projected volumes", Works, "by 9p, live both ways, kubelet's updates included; volumes.md says what 9p cannot do", tests("TestVolumes", "TestVolumeSwap", "TestVolumeFiles")},
		{"raw block volumes (volumeDevices)", Works, "hot-plugged as disks, read-only on the host's side too; with `hostUsers: false` refused, as by Kubernetes", tests("TestBlockDevices", "TestBlockDeviceRestart", "TestBlockDeviceReadOnly", "TestBlockDeviceOfPods", "TestRefusedContainers")},
		{"file systems of block devices and images, mounted by the VM", Works, "direct volumes, by an annotation (volumes.md); off unless the node's configuration allows places", tests("TestDirectVolumes", "TestDirectVolumesRefused", "TestDirectVolumeUserns")},
		{"device plugins, GPUs, VFIO, dynamic resource allocation", Partly, "by CRI or CDI: block devices as disks, nodes of null, zero, full, random, urandom, tty, net/tun and fuse, variables of CDI; other devices of the host's and hooks are refused", tests("TestDevices", "TestRefusedContainers")},
		{"NRI plugins", Partly, "adjustments of limits, rlimits, variables, tmpfs and known devices work; hooks, devices of the host, namespaces, sysctls, schedulers and I/O limits are refused", tests("TestNRI", "TestNRIRefused")},
		{"checkpoint (kubelet's API)", Refused, "a container in a VM cannot be checkpointed", tests("TestCheckpointRefused")},
		{"pause container", Ignored, "none is run, and its image is not pulled", tests("TestCrictl")},
		{"images", Works, "any image that containerd has unpacked, with links, xattrs, devices, odd names; several in a pod", tests("TestRootFS", "TestRootFSImages", "TestImageDisks", "TestPathsThatEscape", "TestBadImages")},
		{"image VOLUMEs", Works, "a directory of the host each, as CRI makes it", tests("TestImageVolume")},
		{"restart of containerd", Works, "pods go on, and are taken up again", tests("TestRestart", "TestRestartDied")},
	},
}
