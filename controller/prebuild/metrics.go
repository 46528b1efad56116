// SPDX-License-Identifier: Apache-2.0
// Copyright The containerd-cloudhv Authors

package prebuild

import (
	metrics "github.com/docker/go-metrics"
)

var prebuildCounter metrics.LabeledCounter

func init() {
	ns := metrics.NewNamespace("containerd_cloudhv", "image", nil)
	prebuildCounter = ns.NewLabeledCounter("prebuilds",
		"Images whose file systems were to be made before a pod asked, by result: built, no_room, gone, dropped, failed", "result")
	for _, r := range []string{"built", "no_room", "gone", "dropped", "failed"} {
		prebuildCounter.WithValues(r).Inc(0)
	}
	metrics.Register(ns)
}
