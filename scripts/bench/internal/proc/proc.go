// Package proc reads what processes cost, from Linux's /proc.
//
// CPU time comes in ticks of 10 ms, so measure for seconds.
package proc

import (
	"fmt"
	"os"
	"strconv"
	"strings"
	"time"
)

// Usage is the sum of some processes.
type Usage struct {
	CPU time.Duration // user and system
	RSS int64         // resident memory in bytes
}

// tick is USER_HZ, which is 100 on every Linux.
const tick = 10 * time.Millisecond

// Of adds up the processes. One that has ended is an error: its time is lost.
func Of(pids []int) (Usage, error) {
	var sum Usage
	for _, pid := range pids {
		b, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
		if err != nil {
			return sum, err
		}
		u, err := parse(string(b))
		if err != nil {
			return sum, fmt.Errorf("process %d: %w", pid, err)
		}
		sum.CPU += u.CPU
		sum.RSS += u.RSS
	}
	return sum, nil
}

// parse reads a stat file, proc(5). The name, in brackets, may hold anything:
// fields are counted behind the last bracket, where the third begins.
func parse(stat string) (Usage, error) {
	fields := strings.Fields(stat[strings.LastIndexByte(stat, ')')+1:])
	if len(fields) < 22 {
		return Usage{}, fmt.Errorf("stat has %d fields", len(fields))
	}
	var u Usage
	for _, f := range []struct {
		at  int // counted as in proc(5)
		add func(n int64)
	}{
		{14, func(n int64) { u.CPU += time.Duration(n) * tick }},
		{15, func(n int64) { u.CPU += time.Duration(n) * tick }},
		{24, func(n int64) { u.RSS = n * int64(os.Getpagesize()) }},
	} {
		n, err := strconv.ParseInt(fields[f.at-3], 10, 64)
		if err != nil {
			return Usage{}, err
		}
		f.add(n)
	}
	return u, nil
}
