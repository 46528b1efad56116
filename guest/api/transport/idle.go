// SPDX-License-Identifier: Apache-2.0
// Copyright The containerd-cloudhv Authors

package transport

import "time"

const (
	// maxIdleFrames is how many frames without use a guest may send at once, and
	// idlePerSecond how many more each second. A stream has a handful of them.
	maxIdleFrames = 16 << 10
	idlePerSecond = 1000
	// bytesPerIdle is for how many bytes that the host has sent there is one more: the
	// guest tells that it has read them, each half a window.
	bytesPerIdle = 16 << 10
	// idlePause is for how long a guest is not read that has sent too many.
	idlePause = 50 * time.Millisecond
)

// idleFrames counts the frames that bring nothing: window updates, ends, empty data, and
// all that is for no stream. They cost the guest little, and the host as much as others,
// so a guest that sends them without end is read slowly.
type idleFrames struct {
	at   time.Time
	left float64
	sent int64
}

// one takes note of a frame; sent is what the host has sent until now, in bytes.
func (f *idleFrames) one(sent int64) {
	now := time.Now()
	if f.at.IsZero() {
		f.left = maxIdleFrames
	} else {
		f.left += now.Sub(f.at).Seconds()*idlePerSecond + float64(sent-f.sent)/bytesPerIdle
	}
	f.at, f.sent = now, sent
	f.left = min(f.left, maxIdleFrames) - 1
	if f.left < 0 {
		time.Sleep(idlePause)
	}
}
