// SPDX-License-Identifier: Apache-2.0
// Copyright The containerd-cloudhv Authors

// Package ninep serves directories and files of the host to a pod's VM by
// 9p2000.L, the protocol of Linux's 9p file system.
//
// One Server serves one pod. Its root is a directory that is not on any disk:
// each volume is an entry of it, an Export, and nothing else is. The client is
// the guest's kernel or whoever has taken its place, so nothing of what it sends is
// trusted:
//
//   - A fid is a file descriptor of the host's (O_PATH), never a path. What a message
//     names is one component of a directory that a fid stands for. It is looked up by
//     openat2 with RESOLVE_BENEATH, RESOLVE_NO_SYMLINKS and RESOLVE_NO_MAGICLINKS; a
//     name with a slash, "." and ".." are refused. Symbolic links are read, and
//     followed by the guest. So no rename, however timed, leads out of a volume.
//   - Only regular files and directories are opened. FIFOs, sockets and device nodes are
//     inodes to look at: who opens one in the guest gets the guest's own.
//   - Messages, fids, requests under way and the size of extended attributes are bounded
//     (Limits); beyond a limit a request fails, or the client waits.
//
// The guest's kernel checks permissions, as the server acts as the host's root does.
// What is made belongs to the user that the fid was attached for, and to the group
// that the message names. Numbers are carried as they are.
//
// A library was considered (hugelgupf/p9). Its server tells a file system nothing of the
// user that attaches, so that all that is made would be root's; closes a file twice after
// an extended attribute was read; keeps an entry for every name that was ever asked for;
// and holds a lock of the whole tree while a file is read.
package ninep
