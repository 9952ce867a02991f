package main

import (
	"os"
	"strings"
	"testing"
	"time"
)

func TestFiguresAreReadFromATestsLog(t *testing.T) {
	const ms = time.Millisecond
	for line, want := range map[string]reading{
		"    outlive_linux_test.go:136: figure: the gap: 670.1ms; 95 % at most 1s, all at most 2s\n": {"the gap", 670100 * time.Microsecond, 1000 * ms, 2000 * ms},
		"figure: UDP: off: 0s; 95 % at most 100ms, all at most 100ms":                                {"UDP: off", 0, 100 * ms, 100 * ms},
		"    outlive_linux_test.go:136: the gap: 670ms, at most 2s":                                  {},
		"figure: the gap: soon; 95 % at most 1s, all at most 2s":                                     {},
		"figure: the gap: 1ms; 95 % at most 1s, all at most 2s (and more)":                           {},
	} {
		if got, ok := readFigure(line); ok != (want != reading{}) || ok && got != want {
			t.Errorf("%q: %+v, %v", line, got, ok)
		}
	}
}

func TestFaultsAreJudgedByBothBounds(t *testing.T) {
	var r faults
	add := func(test string, ms ...int) {
		for _, n := range ms {
			r.add(test, reading{"the gap", time.Duration(n) * time.Millisecond, time.Second, 2 * time.Second})
		}
	}
	twenty := func(n int) []int {
		all := make([]int, 20)
		for i := range all {
			all[i] = 900
		}
		for i := range n {
			all[i] = 1500
		}
		return all
	}
	add("T/well", twenty(1)...)
	add("T/often_late", twenty(2)...)
	add("T/once_too_late", append(twenty(0)[1:], 2001)...)
	add("T/broken", twenty(0)...)
	r.fail("T/broken")
	for i, want := range []string{"pass", "FAIL", "FAIL", "FAIL, 1 of 20 runs"} {
		if got := r.Rows[i].outcome(); got != want {
			t.Errorf("%s: %s, want %s", r.Rows[i].Test, got, want)
		}
	}
	r.measured = "later"
	r.fail("T/broken")
	r.fail("T")
	if len(r.Rows) != 5 || r.Rows[4].outcome() != "FAIL, 1 of 0 runs" {
		t.Errorf("a test that fails before it has a figure: %+v", r.Rows)
	}
	add("T/well", 1)
	if got := r.Rows[0]; len(got.Ms) != 1 || got.Measured != "later" || len(r.Rows[1].Ms) != 20 {
		t.Errorf("a later measurement stands beside an earlier one's figures: %+v", got)
	}
	text := r.markdown()
	if !strings.Contains(text, "| often late | the gap | 20 | 900 | 1500 | ≤ 1000 | 1500 | ≤ 2000 | FAIL |") {
		t.Error(text)
	}
	readme, err := os.ReadFile("README.md")
	if err != nil {
		t.Fatal(err)
	}
	if _, err := publish(string(readme), faultsMarks, text); err != nil {
		t.Error(err)
	}
}
