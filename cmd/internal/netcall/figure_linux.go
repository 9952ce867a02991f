package netcall

import (
	"testing"
	"time"
)

// Figure logs what a test has measured, and the bounds on it: for 95 % of many
// runs, and for each. scripts/bench reads such lines when it repeats tests.
func Figure(t testing.TB, what string, figure, usual, most time.Duration) {
	t.Helper()
	t.Logf("figure: %s: %v; 95 %% at most %v, all at most %v", what, figure.Round(100*time.Microsecond), usual, most)
}
