package proc

import (
	"os"
	"testing"
	"time"
)

func TestStatWithABracketInTheName(t *testing.T) {
	u, err := parse("12 (a) b) S 1 2 3 4 5 6 7 8 9 10 150 50 0 0 20 0 8 0 99 1000000 25 0 0")
	if err != nil || u.CPU != 2*time.Second || u.RSS != 25*int64(os.Getpagesize()) {
		t.Errorf("got %+v, %v", u, err)
	}
	if _, err := parse("12 (a) S 1"); err == nil {
		t.Error("half a stat was read")
	}
}

func TestThisProcessHasMemory(t *testing.T) {
	if u, err := Of([]int{os.Getpid()}); err != nil || u.RSS == 0 {
		t.Errorf("got %+v, %v", u, err)
	}
}
