//go:build unix

package egress

import (
	"syscall"
	"testing"
)

func TestAssociationsAndStreamsLeaveDescriptorsForTheRest(t *testing.T) {
	var was syscall.Rlimit
	if err := syscall.Getrlimit(syscall.RLIMIT_NOFILE, &was); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := syscall.Setrlimit(syscall.RLIMIT_NOFILE, &was); err != nil {
			t.Error(err)
		}
	})
	for _, c := range []struct{ files, asked, want, streams int }{
		{200, 0, 160, 30},
		{200, 1000, 160, 30},
		{200, 100, 100, 30},
		{200, 20, 20, 20},
	} {
		now := was
		now.Cur = 0
		for range c.files { // its type differs between systems
			now.Cur++
		}
		if err := syscall.Setrlimit(syscall.RLIMIT_NOFILE, &now); err != nil {
			t.Fatal(err)
		}
		if e := newEgress(t, Config{MaxAssociations: c.asked, MaxStreams: c.asked}); e.cfg.MaxAssociations != c.want || e.cfg.MaxStreams != c.streams {
			t.Errorf("%d associations and %d streams with %d files and %d of each configured, want %d and %d", e.cfg.MaxAssociations, e.cfg.MaxStreams, c.files, c.asked, c.want, c.streams)
		}
	}
}

// One session may have 10,000 of its own.
func TestManySessionsFitByDefault(t *testing.T) {
	want := 100000
	if n := maxFiles(); n > 0 {
		want = min(want, n/5*4)
	}
	if e := newEgress(t, Config{}); e.cfg.MaxAssociations != want {
		t.Errorf("%d associations by default, want %d", e.cfg.MaxAssociations, want)
	}
}
