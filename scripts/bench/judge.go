package main

import (
	"fmt"
	"slices"
	"strings"

	"culvert/scripts/bench/internal/measure"
)

// entry is one subject in one row.
type entry struct {
	Subject string           `json:"subject"`
	Error   string           `json:"error,omitempty"`
	Result  *measure.Result  `json:"result,omitempty"` // the middle one of all rounds
	OwnMs   float64          `json:"own_queues_ms"`
	Rounds  []measure.Result `json:"rounds,omitempty"` // where there is more than one
}

// verdict is a bar and what came of it.
type verdict struct {
	Subject string  `json:"subject"`
	Bar     string  `json:"bar"`
	Figure  float64 `json:"figure"`
	Limit   float64 `json:"limit"`
	Rival   string  `json:"rival,omitempty"` // whose figure the limit comes from
	Theirs  float64 `json:"rival_figure,omitempty"`
	Outcome string  `json:"outcome"` // pass, FAIL, or why it is unknown
	digits  int
}

// judge holds the entries of a row against its bars.
func judge(r row, entries []entry) (verdicts []verdict) {
	get := func(name string, c column) (float64, bool) {
		i := slices.IndexFunc(entries, func(e entry) bool { return e.Subject == name })
		if i < 0 {
			return 0, false
		}
		return c.of(entries[i])
	}
	for _, b := range r.bars {
		v := verdict{Subject: b.subject, Bar: b.String(), digits: b.column.digits}
		figure, known := get(b.subject, b.column)
		v.Figure, v.Limit = figure, b.plus
		if len(b.others) > 0 {
			for _, other := range b.others {
				f, ok := get(other, b.column)
				if ok && (v.Rival == "" || b.most == (f < v.Theirs)) {
					v.Rival, v.Theirs = other, f
				}
			}
			v.Limit = b.times*v.Theirs + b.plus
		}
		switch {
		case !known:
			v.Outcome = "not measured"
		case len(b.others) > 0 && v.Rival == "":
			v.Outcome = "nothing to compare with"
		case b.most == (figure < v.Limit) || figure == v.Limit:
			v.Outcome = "pass"
		default:
			v.Outcome = "FAIL"
		}
		verdicts = append(verdicts, v)
	}
	return verdicts
}

// String says the bar in words, as in "on time, % ≥ direct − 0.5".
func (b bar) String() string {
	sign := "≥"
	if b.most {
		sign = "≤"
	}
	limit := number(b.plus, -1)
	if len(b.others) > 0 {
		limit = strings.Join(b.others, ", ")
		if len(b.others) > 1 {
			limit = "the best of " + limit
		}
		if b.times != 1 {
			limit = number(b.times, -1) + " × " + limit
		}
		switch {
		case b.plus > 0:
			limit += " + " + number(b.plus, -1)
		case b.plus < 0:
			limit += " − " + number(-b.plus, -1)
		}
	}
	return fmt.Sprintf("%s %s %s", b.column.head, sign, limit)
}
