package main

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"log/slog"
	"os"
	"sync"
	"time"

	"go.uber.org/goleak"

	"culvert/cmd/internal/assemble"
	"culvert/cmd/internal/config"
	"culvert/tunnel"
)

// stampedeConfig makes the test binary play sidecars, which are alike but for
// their keys: it is the file that they are made by.
const stampedeConfig = "CULVERT_TEST_STAMPEDE_CONFIG"

// stampedeStarts is how many sidecars start at once: it is not the start that is
// to be measured.
const stampedeStarts = 32

// stampedeNews is a line that the process of sidecars writes about one of them.
type stampedeNews struct {
	Sidecar int
	At      time.Time
	Session string      `json:",omitzero"` // that it is ready in
	Code    tunnel.Code `json:",omitzero"` // why it is not; with Refused: in the cloud proxy's word
	Why     string      `json:",omitzero"`
	Refused bool        `json:",omitzero"`
	Over    bool        `json:",omitzero"` // it does not try any more
}

// stampede plays as many sidecars as its only argument says, until the standard
// input ends, and returns the exit code: 1 when something is left of them.
func stampede(args []string) int {
	many := 0
	if _, err := fmt.Sscan(args[1], &many); err != nil {
		panic(err)
	}
	news := make(chan stampedeNews, many)
	var telling sync.WaitGroup
	telling.Go(func() {
		out := json.NewEncoder(os.Stdout)
		for n := range news {
			if err := out.Encode(n); err != nil {
				panic(err) // nobody listens any more
			}
		}
	})
	ctx, cancel := context.WithCancel(context.Background())
	var running sync.WaitGroup
	place := make(chan struct{}, stampedeStarts)
	for i := range many {
		c, err := config.ReadSidecar(os.Getenv(stampedeConfig))
		if err != nil {
			panic(err)
		}
		c.Identity.KeyFile, c.Front.Listen = "", "127.0.0.1:0" // a key that nobody else has
		s, err := assemble.NewSidecar(c, slog.New(slog.DiscardHandler))
		if err != nil {
			panic(err)
		}
		running.Go(func() {
			defer s.Close()
			select {
			case place <- struct{}{}:
			case <-ctx.Done():
				return
			}
			started := sync.OnceFunc(func() { <-place })
			defer started()
			err := s.Link.Run(ctx, tunnel.ModeAuto, func(st tunnel.LinkState) {
				if st.Change != nil {
					return
				}
				n := stampedeNews{Sidecar: i, At: time.Now(), Code: st.Code, Why: st.Why, Refused: st.Refused}
				if st.Phase == tunnel.LinkUp {
					started()
					n = stampedeNews{Sidecar: i, At: n.At, Session: st.Session}
				}
				news <- n
			})
			if err != nil {
				news <- stampedeNews{Sidecar: i, At: time.Now(), Over: true, Code: tunnel.CodeOf(err), Why: tunnel.Sentence(err)}
			}
		})
	}
	io.Copy(io.Discard, os.Stdin)
	cancel()
	running.Wait()
	close(news)
	telling.Wait()
	if err := goleak.Find(); err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	return 0
}
