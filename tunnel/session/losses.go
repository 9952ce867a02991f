package session

import (
	"cmp"
	"slices"

	"culvert/tunnel"
)

// Loss is what this end has dropped of one open association in this session.
type Loss struct {
	By      tunnel.Peer       // who opened it
	Dropped map[string]uint64 // datagrams that waited in vain, by reason
	Total   uint64
}

// Losses returns the open associations of which most was dropped here, the
// worst first: n at most, and none of which nothing was.
func (n *Near) Losses(most int) []Loss {
	n.mu.Lock()
	var all []Loss
	for _, p := range n.assocs {
		l := Loss{By: p.by, Dropped: p.leg.Load().line.Dropped()}
		for _, count := range l.Dropped {
			l.Total += count
		}
		if l.Total > 0 {
			all = append(all, l)
		}
	}
	n.mu.Unlock()
	slices.SortFunc(all, func(a, b Loss) int {
		return cmp.Or(cmp.Compare(b.Total, a.Total), a.By.Addr.Compare(b.By.Addr))
	})
	return all[:min(len(all), most)]
}
