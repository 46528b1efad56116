// SPDX-License-Identifier: Apache-2.0
// Copyright The containerd-cloudhv Authors

// Package testnode runs a real, private containerd with the runtime handlers
// "runc" and "cloudhv" beside whatever the host runs already. Everything that a
// node makes lies in one directory, except for a bridge, cgroups and network
// namespaces of its own name, and Close removes all of it.
//
//	n, err := testnode.New(testnode.Options{Name: "demo"}) // directory, bridge, configuration
//	err = n.Start(ctx)                                     // containerd, until its CRI answers
//	defer n.Close(ctx)                                     // pods, containerd, bridge, directory
//
//	err = n.Import(ctx, testimage.BusyboxRef, img)         // an image made in process
//	ref, err := n.Pull(ctx, "docker.io/library/nginx")     // or one from a registry
//
//	pod := n.PodConfig("web")                              // a pod's CRI configuration
//	id, err := n.RunPod(ctx, pod, testnode.CloudHV)
//	c, err := n.CreateContainer(ctx, id, pod, testnode.ContainerConfig("srv", ref, "httpd", "-f"))
//	err = n.StartContainer(ctx, c)
//	out, errOut, code, err := n.ExecSync(ctx, c, "uname", "-r")
//	n.Runtime(), n.ImageService()                          // the CRI's gRPC clients, for the rest
//	n.Endpoint(), n.Crictl(ctx, "ps")                      // the same by crictl
//
//	before, err := n.Census(ctx)                           // processes, mounts, links, files, …
//	diff := after.Diff(before)
//
// Stop, Kill, Start and Restart are for containerd alone: pods run on. Methods
// may be called concurrently, but not with those.
package testnode
