package assemble

import (
	"log/slog"
	"sync/atomic"

	"golang.org/x/time/rate"

	"culvert/policy"
	"culvert/tunnel"
)

// denials logs refusals of the policy, but no flood.
type denials struct {
	log      *slog.Logger
	limit    *rate.Limiter
	unlogged atomic.Int64
}

func newDenials(log *slog.Logger) *denials {
	return &denials{log: log, limit: rate.NewLimiter(10, 50)}
}

// denied is a policy.Guard's Denied. It runs on the path of datagrams, where one
// target is told of once a second at most.
func (d *denials) denied(v policy.Denial) {
	if !d.limit.Allow() {
		d.unlogged.Add(1)
		return
	}
	attrs := []any{auditKey, "policy_denied", "protocol", v.Proto.String(), "to", tunnel.LogText(target(v.To), 120), "code", string(tunnel.PolicyDenied),
		"why", tunnel.LogText(tunnel.Sentence(v.Err), 400), "unlogged", d.unlogged.Swap(0)}
	if v.By.App != "" {
		attrs = append(attrs, "app", v.By.App)
	}
	if v.By.Addr.IsValid() {
		attrs = append(attrs, "from", v.By.Addr)
	}
	if v.Live { // it was allowed before
		attrs = append(attrs, "ended", true)
	}
	d.log.Info("the policy refuses a destination", attrs...)
}

// target is a destination as the packet filters of others see it, where that is
// known; the sentence has its name.
func target(t tunnel.Target) string {
	if t.Addr.IsValid() {
		return t.AddrPort().String()
	}
	return t.String()
}
