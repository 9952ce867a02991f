package control

import (
	"context"
	"errors"
	"testing"
	"time"
)

// A client that leaves ends the stop that waited for it.
func TestLeavingEndsAWaitingStop(t *testing.T) {
	ended := make(chan struct{})
	f := &fake{hold: make(chan struct{}), entered: make(chan struct{}), left: ended}
	c, _ := serve(t, f)
	ctx, cancel := context.WithCancel(t.Context())
	go func() { <-f.entered; cancel() }()
	if _, err := c.Stop(ctx, time.Minute, false); !errors.Is(err, context.Canceled) {
		t.Error(err)
	}
	select {
	case <-ended:
	case <-time.After(time.Minute):
		t.Error("the stop goes on waiting for nobody")
		close(f.hold)
	}
}
