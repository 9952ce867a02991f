//go:build unix

package egress

import (
	"syscall"
	"testing"
)

func TestAssociationsLeaveDescriptorsForTheRest(t *testing.T) {
	var was syscall.Rlimit
	if err := syscall.Getrlimit(syscall.RLIMIT_NOFILE, &was); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := syscall.Setrlimit(syscall.RLIMIT_NOFILE, &was); err != nil {
			t.Error(err)
		}
	})
	for _, c := range []struct{ files, asked, want int }{
		{200, 0, 160},
		{200, 1000, 160},
		{200, 100, 100},
	} {
		now := was
		now.Cur = 0
		for range c.files { // its type differs between systems
			now.Cur++
		}
		if err := syscall.Setrlimit(syscall.RLIMIT_NOFILE, &now); err != nil {
			t.Fatal(err)
		}
		if e := newEgress(t, Config{MaxAssociations: c.asked}); e.cfg.MaxAssociations != c.want {
			t.Errorf("%d associations with %d files and %d configured, want %d", e.cfg.MaxAssociations, c.files, c.asked, c.want)
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
