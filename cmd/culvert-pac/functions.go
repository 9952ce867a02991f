package main

import (
	"context"
	"fmt"
	"net"
	"net/netip"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"time"
)

// world is what a script may learn of outside.
type world struct {
	now    time.Time
	lookup func(ctx context.Context, host string) ([]string, error)
	own    func() string // the address of this host; "": it has none
}

// ownAddress is the one by which this host reaches others. Nothing is sent.
func ownAddress() string {
	c, err := net.Dial("udp4", "192.0.2.1:9")
	if err != nil {
		return ""
	}
	defer c.Close()
	return c.LocalAddr().(*net.UDPAddr).IP.String()
}

// functions are those that a script may call, as Netscape has described them and
// browsers have them since.
func (w world) functions(ctx context.Context) map[string]any {
	resolve := func(host string) any {
		if a, err := netip.ParseAddr(host); err == nil {
			return a.String()
		}
		all, _ := w.lookup(ctx, host)
		for _, text := range all {
			if a, err := netip.ParseAddr(text); err == nil && a.Is4() {
				return text
			}
		}
		return nil
	}
	return map[string]any{
		"isPlainHostName": func(host string) bool { return !strings.ContainsAny(host, ".:") },
		"dnsDomainIs": func(host, domain string) bool {
			return strings.HasSuffix(strings.ToLower(host), strings.ToLower(domain))
		},
		"localHostOrDomainIs": func(host, full string) bool {
			return host == full || !strings.Contains(host, ".") && strings.HasPrefix(full, host+".")
		},
		"dnsDomainLevels": func(host string) int { return strings.Count(host, ".") },
		"isResolvable":    func(host string) bool { return resolve(host) != nil },
		"dnsResolve":      resolve,
		"myIpAddress": func() string {
			if a := w.own(); a != "" {
				return a
			}
			return "127.0.0.1"
		},
		"isInNet": func(host, network, mask string) bool {
			text, _ := resolve(host).(string)
			return masked(text, mask) == masked(network, mask) && masked(network, mask) != 0 || mask == "0.0.0.0" && text != ""
		},
		"convert_addr": func(text string) uint32 { return masked(text, "255.255.255.255") },
		"shExpMatch":   shExpMatch,
		"weekdayRange": func(args ...string) bool { return w.weekdays(args) },
		"dateRange":    func(args ...any) bool { return w.dates(args) },
		"timeRange":    func(args ...any) bool { return w.times(args) },
		"alert":        func(...any) {},
	}
}

// masked is an IPv4 address under a mask; 0: it is none.
func masked(text, mask string) uint32 {
	var v [2]uint32
	for i, t := range []string{text, mask} {
		a, err := netip.ParseAddr(t)
		if err != nil || !a.Is4() {
			return 0
		}
		b := a.As4()
		v[i] = uint32(b[0])<<24 | uint32(b[1])<<16 | uint32(b[2])<<8 | uint32(b[3])
	}
	return v[0] & v[1]
}

// shExpMatch matches a shell pattern of * and ?.
func shExpMatch(text, pattern string) bool {
	p := regexp.QuoteMeta(pattern)
	p = strings.NewReplacer(`\*`, ".*", `\?`, ".").Replace(p)
	re, err := regexp.Compile("(?s)^" + p + "$")
	return err == nil && re.MatchString(text)
}

var (
	weekdays = []string{"SUN", "MON", "TUE", "WED", "THU", "FRI", "SAT"}
	months   = []string{"JAN", "FEB", "MAR", "APR", "MAY", "JUN", "JUL", "AUG", "SEP", "OCT", "NOV", "DEC"}
)

// zoned takes GMT from the end of the arguments.
func zoned[T any](now time.Time, args []T) (time.Time, []T) {
	if n := len(args); n > 0 && strings.EqualFold(fmt.Sprint(args[n-1]), "GMT") {
		return now.UTC(), args[:n-1]
	}
	return now, args
}

// between compares what two ends and now have, field by field, largest first. Where
// the first end is after the second, it is the range over the turn of the year, the
// week or the day.
func between(from, now, to []int) bool {
	if slices.Compare(from, to) <= 0 {
		return slices.Compare(from, now) <= 0 && slices.Compare(now, to) <= 0
	}
	return slices.Compare(from, now) <= 0 || slices.Compare(now, to) <= 0
}

func (w world) weekdays(args []string) bool {
	now, args := zoned(w.now, args)
	if len(args) == 1 {
		args = append(args, args[0])
	}
	if len(args) != 2 {
		return false
	}
	from, to := slices.Index(weekdays, args[0]), slices.Index(weekdays, args[1])
	return from >= 0 && to >= 0 && between([]int{from}, []int{int(now.Weekday())}, []int{to})
}

// halves splits numbers that name one moment, or two of the same kind.
func halves[T any](args []T) (from, to []T, ok bool) {
	if len(args) == 1 {
		return args, args, true
	}
	n := len(args) / 2
	return args[:n], args[n:], n > 0 && len(args)%2 == 0
}

func (w world) times(args []any) bool {
	now, args := zoned(w.now, args)
	var n []int
	for _, a := range args {
		v, err := strconv.Atoi(fmt.Sprint(a))
		if err != nil {
			return false
		}
		n = append(n, v)
	}
	from, to, ok := halves(n)
	if !ok || len(from) > 3 {
		return false
	}
	return between(from, []int{now.Hour(), now.Minute(), now.Second()}[:len(from)], to)
}

// dates takes days, months and years, in any mixture that both ends have.
func (w world) dates(args []any) bool {
	now, args := zoned(w.now, args)
	from, to, ok := halves(args)
	if !ok {
		return false
	}
	var ends [2][]int
	var at []int
	for i, end := range [][]any{from, to} {
		var year, month, day int
		for _, a := range end {
			text := fmt.Sprint(a)
			v, err := strconv.Atoi(text)
			switch m := slices.Index(months, text); {
			case m >= 0:
				month = m + 1
			case err != nil:
				return false
			case v > 31:
				year = v
			default:
				day = v
			}
		}
		at = nil
		for _, f := range [][2]int{{year, now.Year()}, {month, int(now.Month())}, {day, now.Day()}} {
			if f[0] > 0 {
				ends[i], at = append(ends[i], f[0]), append(at, f[1])
			}
		}
	}
	return len(ends[0]) == len(ends[1]) && len(at) > 0 && between(ends[0], at, ends[1])
}
