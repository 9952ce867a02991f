package cmdtest

import (
	"testing"
	"time"

	"go.uber.org/goleak"
)

// NothingRuns waits until only the goroutines in already are left. It is
// patient, because what has been told to end may need a moment for it.
func NothingRuns(t testing.TB, already goleak.Option) {
	t.Helper()
	const patience = time.Minute
	var err error
	for end := time.Now().Add(patience); time.Now().Before(end); {
		if err = goleak.Find(already); err == nil {
			return
		}
	}
	t.Error(err)
}
