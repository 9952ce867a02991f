// Package measure holds what a run of the load program found, and the
// statistics that it is made of.
//
// Delays in it are one-way, in milliseconds; a packet that never came back
// has none and counts as lost.
package measure

import (
	"math"
	"slices"
	"time"
)

// Result is what one run of the load program found. What a mode does not
// measure is zero and left out of the JSON.
type Result struct {
	Mode     string  `json:"mode"`
	Duration float64 `json:"s"`

	Sent     int             `json:"sent,omitempty"`
	Back     int             `json:"back,omitempty"`
	LossPct  float64         `json:"loss_pct,omitempty"`
	OnTime   float64         `json:"on_time_pct,omitempty"` // sent packets that came back with at most the budget each way
	BudgetMs float64         `json:"budget_ms,omitempty"`
	Up       *Delays         `json:"up_ms,omitempty"`
	Down     *Delays         `json:"down_ms,omitempty"`
	Oldest   float64         `json:"oldest_ms,omitempty"` // the oldest packet that was delivered, in either direction
	Gap      float64         `json:"gap_ms,omitempty"`    // the longest time that a flow was without a packet
	Kinds    map[string]Kind `json:"kinds,omitempty"`
	Series   *Series         `json:"series,omitempty"`

	Echoes float64 `json:"echoes_per_s,omitempty"`
	Bulk   float64 `json:"bulk_mbit_s,omitempty"`

	CPUPerPacket float64 `json:"cpu_us_per_packet,omitempty"` // a packet there and its echo are two
	CPUPerGB     float64 `json:"cpu_s_per_gb,omitempty"`
	RSS          float64 `json:"rss_mb,omitempty"`

	PerFlowKB float64 `json:"kb_per_flow,omitempty"`
	Flows     int     `json:"flows,omitempty"`
	Failed    int     `json:"failed,omitempty"`
	First     *Delays `json:"first_ms,omitempty"` // from the first byte to the proxy to the first echo
}

// Kind is one kind of flow, as audio or video.
type Kind struct {
	Sent   int     `json:"sent"`
	Back   int     `json:"back"`
	OnTime float64 `json:"on_time_pct"`
	Up     Delays  `json:"up_ms"`
	Down   Delays  `json:"down_ms"`
}

// Delays are quantiles in milliseconds.
type Delays struct {
	P50 float64 `json:"p50"`
	P95 float64 `json:"p95"`
	P99 float64 `json:"p99"`
	Max float64 `json:"max"`
}

// Quantiles orders v and returns its quantiles; zeroes where v is empty.
func Quantiles(v []time.Duration) Delays {
	slices.Sort(v)
	return Delays{P50: quantile(v, .5), P95: quantile(v, .95), P99: quantile(v, .99), Max: quantile(v, 1)}
}

// quantile is the nearest rank of q in v, which is in order.
func quantile(v []time.Duration, q float64) float64 {
	if len(v) == 0 {
		return 0
	}
	rank := int(math.Ceil(q*float64(len(v)))) - 1
	return Ms(v[max(rank, 0)])
}

// Ms is d in milliseconds, to the microsecond.
func Ms(d time.Duration) float64 { return float64(d.Microseconds()) / 1e3 }

// Percent is 100 × part/whole; 0 of nothing.
func Percent(part, whole int) float64 {
	if whole == 0 {
		return 0
	}
	return 100 * float64(part) / float64(whole)
}

// Sample is one packet that came back.
type Sample struct {
	Sent     time.Duration // after the start of the run
	Up, Down time.Duration
}

// Bin is the width of a Series' bins.
const Bin = 100 * time.Millisecond

// Series is how a run went: one entry for each Bin, by the time of sending.
type Series struct {
	BinMs   float64   `json:"bin_ms"`
	Sent    []int     `json:"sent"`
	Back    []int     `json:"back"`
	UpP50   []float64 `json:"up_p50"`
	UpMax   []float64 `json:"up_max"`
	DownP50 []float64 `json:"down_p50"`
	DownMax []float64 `json:"down_max"`
}

// NewSeries sorts packets into bins over the time d. sent are the times at which packets left.
func NewSeries(d time.Duration, sent []time.Duration, back []Sample) *Series {
	n := int((d + Bin - 1) / Bin)
	s := &Series{
		BinMs: Ms(Bin), Sent: make([]int, n), Back: make([]int, n),
		UpP50: make([]float64, n), UpMax: make([]float64, n), DownP50: make([]float64, n), DownMax: make([]float64, n),
	}
	at := func(t time.Duration) int { return min(max(int(t/Bin), 0), n-1) }
	if n == 0 {
		return s
	}
	for _, t := range sent {
		s.Sent[at(t)]++
	}
	up, down := make([][]time.Duration, n), make([][]time.Duration, n)
	for _, b := range back {
		i := at(b.Sent)
		s.Back[i]++
		up[i], down[i] = append(up[i], b.Up), append(down[i], b.Down)
	}
	for i := range n {
		u, d := Quantiles(up[i]), Quantiles(down[i])
		s.UpP50[i], s.UpMax[i], s.DownP50[i], s.DownMax[i] = u.P50, u.Max, d.P50, d.Max
	}
	return s
}
