package main

import (
	"time"

	"culvert/scripts/bench/internal/measure"
)

// count is what a set of streams comes to.
type count struct {
	sent, back, onTime int
	up, down           []time.Duration
}

func (c *count) add(s *stream, budget time.Duration) {
	c.sent += len(s.sent)
	c.back += len(s.back)
	for _, b := range s.back {
		c.up, c.down = append(c.up, b.Up), append(c.down, b.Down)
		if b.Up <= budget && b.Down <= budget {
			c.onTime++
		}
	}
}

// summarize says what came of the streams, as a whole and by kind.
func summarize(r *measure.Result, streams []*stream, o *options) {
	var all count
	kinds := map[string]*count{}
	var sent []time.Duration
	var back []measure.Sample
	for _, s := range streams {
		all.add(s, o.budget)
		if kinds[s.kind.name] == nil {
			kinds[s.kind.name] = &count{}
		}
		kinds[s.kind.name].add(s, o.budget)
		r.Gap = max(r.Gap, measure.Ms(s.gap))
		sent, back = append(sent, s.sent...), append(back, s.back...)
	}
	up, down := measure.Quantiles(all.up), measure.Quantiles(all.down)
	r.Sent, r.Back, r.Up, r.Down = all.sent, all.back, &up, &down
	r.LossPct = 100 - measure.Percent(all.back, all.sent)
	r.OnTime, r.BudgetMs = measure.Percent(all.onTime, all.sent), measure.Ms(o.budget)
	if len(kinds) > 1 {
		r.Kinds = map[string]measure.Kind{}
		for name, c := range kinds {
			r.Kinds[name] = measure.Kind{
				Sent: c.sent, Back: c.back, OnTime: measure.Percent(c.onTime, c.sent),
				Up: measure.Quantiles(c.up), Down: measure.Quantiles(c.down),
			}
		}
	}
	if o.series {
		r.Series = measure.NewSeries(o.dur, sent, back)
	}
}
