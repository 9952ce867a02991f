package assemble_test

import (
	"context"
	"crypto/ed25519"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"culvert/cloudproxy/identity"
	"culvert/cmd/internal/assemble"
	"culvert/cmd/internal/cmdtest"
	"culvert/cmd/internal/config"
	"culvert/policy"
	"culvert/sidecar"
	"culvert/tunnel"
)

// An App ID's own policy is in force for its sessions alone, and goes with the
// App ID.
func TestEachAppIDHasItsOwnPolicy(t *testing.T) {
	far := cmdtest.StreamEcho(t)
	s := newSite(t)
	cloud, _ := s.cloud(t)
	var loopback policy.Config
	loopback.AllowCIDR(netip.MustParsePrefix("127.0.0.0/8"))
	all, err := policy.New(loopback)
	if err != nil {
		t.Fatal(err)
	}
	nothing, err := policy.New(policy.Config{Profiles: []string{"agora-mainland-test"}})
	if err != nil {
		t.Fatal(err)
	}
	sc := s.sidecar(t, tunnel.ModeTCP) // of the App ID "test"
	keys := identity.NewKeys(s.signer.Public().(ed25519.PublicKey))
	for name, c := range map[string]struct {
		rules assemble.Rules
		reply byte
	}{
		"the general one":  {assemble.Rules{Keys: keys, Policy: all}, 0},
		"its own":          {assemble.Rules{Keys: keys, Policy: all, Apps: map[string]assemble.App{"test": {Policy: nothing}}}, 2},
		"another App ID's": {assemble.Rules{Keys: keys, Policy: all, Apps: map[string]assemble.App{"test": {}, "other": {Policy: nothing}}}, 0},
	} {
		if err := cloud.Change(c.rules); err != nil {
			t.Fatal(err)
		}
		if conn, reply := request(t, sc.Front.Addr(), 1, far); reply[1] != c.reply {
			t.Errorf("%s: reply %d, want %d", name, reply[1], c.reply)
		} else {
			conn.Close()
		}
	}
	if err := cloud.Change(assemble.Rules{Keys: keys, Policy: all, Apps: map[string]assemble.App{"other": {}}}); err != nil {
		t.Fatal(err)
	}
	eventually(t, "the session of an App ID that is not served any more ends", func() bool {
		st := sc.Switch.Status()
		return st.State == sidecar.Failed && st.Code == tunnel.TokenRejected && cloud.Sessions() == 0
	})
}

// Ten places, and far more sidecars that want one, over real connections: ten
// have one at each moment, and a place is free when its session has ended.
func TestAQuotaHoldsAgainstSidecarsThatComeAtOnce(t *testing.T) {
	const places, claims = 3, 24
	s := newSite(t)
	s.places = places
	cloud, _ := s.cloud(t)
	var running, refused atomic.Int32
	var all []*assemble.Sidecar
	for range claims {
		all = append(all, s.stopped(t, tunnel.ModeTCP))
	}
	var wg sync.WaitGroup
	for _, sc := range all {
		wg.Go(func() {
			ctx, cancel := context.WithTimeout(t.Context(), patience)
			defer cancel()
			for {
				_, err := sc.Switch.Start(ctx, sidecar.StartOptions{})
				switch tunnel.CodeOf(err) {
				case "":
					running.Add(1)
				case tunnel.QuotaExceeded:
					refused.Add(1)
				case tunnel.CloudUnreachable, tunnel.TimedOut:
					if ctx.Err() == nil {
						continue // the machine is busy
					}
				default:
					t.Error(err)
				}
				return
			}
		})
	}
	wg.Wait()
	if running.Load() != places || refused.Load() != claims-places || cloud.Sessions() != places {
		t.Fatalf("%d run, %d were refused, %d sessions", running.Load(), refused.Load(), cloud.Sessions())
	}
	for _, sc := range all {
		if sc.Switch.Status().State != sidecar.Running {
			continue
		}
		if _, err := sc.Switch.Stop(t.Context(), sidecar.StopOptions{Force: true}); err != nil {
			t.Fatal(err)
		}
	}
	eventually(t, "every place is free again", func() bool { return cloud.Sessions() == 0 })
	start(t, all[0])
}

func TestAConfigurationsRulesAreReadWithTheirFiles(t *testing.T) {
	dir := t.TempDir()
	in := func(name string) string { return filepath.Join(dir, name) }
	key, err := identity.GenerateKey()
	if err != nil {
		t.Fatal(err)
	}
	if err := identity.SavePublicKey(in("token.pub"), key.Public().(ed25519.PublicKey)); err != nil {
		t.Fatal(err)
	}
	if err := identity.AppendRevoked(in("revoked"), identity.Revocation{ID: "x"}); err != nil {
		t.Fatal(err)
	}
	text := `
address: a.example
certificate: {cert_file: c, key_file: k}
tokens: {public_keys: token.pub, revoked_file: revoked}
apps:
  - {id: clinic, sessions: 2, policy: {profiles: [agora-mainland-test]}, limits: {streams: 7}}
  - {id: office}
policy: {profiles: [public]}
`
	if err := os.WriteFile(in("cloudproxy.yaml"), []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	conf, err := config.ReadCloudProxy(in("cloudproxy.yaml"))
	if err != nil {
		t.Fatal(err)
	}
	r, err := assemble.RulesFrom(conf)
	if err != nil {
		t.Fatal(err)
	}
	if clinic := r.Apps["clinic"]; clinic.Sessions != 2 || clinic.Limits.Streams != 7 || clinic.Policy == nil || r.Apps["office"].Policy != nil || len(r.Apps) != 2 {
		t.Errorf("%+v", r.Apps)
	}
	if !r.Revoked.Revokes(identity.Claims{ID: "x"}, "") || len(r.Keys) != 1 {
		t.Errorf("%+v", r)
	}
	os.WriteFile(in("revoked"), []byte("nonsense"), 0o600)
	if _, err := assemble.RulesFrom(conf); tunnel.CodeOf(err) != tunnel.ConfigInvalid {
		t.Errorf("a list that is none: %v", err)
	}
	os.Remove(in("revoked"))
	if _, err := assemble.RulesFrom(conf); tunnel.CodeOf(err) != tunnel.ConfigInvalid {
		t.Errorf("a list that is missing: %v", err)
	}
}

// What a file holds is looked at when it has stood still, whatever way it came
// to be, and at once where somebody asks.
func TestFilesThatChangeAreNoticed(t *testing.T) {
	dir := t.TempDir()
	file := filepath.Join(dir, "f")
	write := func(name, text string) {
		if err := os.WriteFile(name, []byte(text), 0o600); err != nil {
			t.Error(err)
		}
	}
	write(file, "a")
	synctest.Test(t, func(t *testing.T) {
		var mu sync.Mutex
		var heard []bool // guarded by mu
		tell := func(asked bool) { mu.Lock(); heard = append(heard, asked); mu.Unlock() }
		told := func() (all []bool) { mu.Lock(); defer mu.Unlock(); all, heard = heard, nil; return all }
		ask := make(chan struct{}, 1)
		ctx, cancel := context.WithCancel(t.Context())
		known := assemble.Stamps([]string{file})
		write(file, "changed before it is followed")
		done := make(chan struct{})
		go func() {
			defer close(done)
			assemble.Follow(ctx, known, func() []string { return []string{file, "", filepath.Join(dir, "missing")} }, ask, tell)
		}()
		for _, c := range []struct {
			name   string
			change func()
			want   int
		}{
			{"before", func() {}, 1},
			{"nothing", func() {}, 0},
			{"written in place", func() { write(file, "longer") }, 1},
			{"replaced", func() { write(file+"2", "longer"); os.Rename(file+"2", file) }, 1},
			{"taken away", func() { os.Remove(file) }, 0},
			{"written again", func() { write(file, "other") }, 1},
			{"a link that points elsewhere", func() { write(file+"3", "other"); os.Remove(file); os.Symlink(file+"3", file) }, 1},
			{"written in pieces", func() {
				for n := range 5 {
					write(file, strings.Repeat("x", n+20))
					time.Sleep(300 * time.Millisecond)
				}
			}, 1},
		} {
			c.change()
			time.Sleep(1100 * time.Millisecond)
			synctest.Wait()
			if heard := told(); len(heard) != c.want || len(heard) > 0 && heard[0] {
				t.Errorf("%s: told %v, want %d times, unasked", c.name, heard, c.want)
			}
		}
		ask <- struct{}{}
		synctest.Wait()
		if heard := told(); len(heard) != 1 || !heard[0] {
			t.Errorf("asked, and told %v", heard)
		}
		cancel()
		<-done
	})
}

// A number that no user can have is not that of root, whatever the system makes of it.
func TestLocalUsersAreWhoTheyAreCalled(t *testing.T) {
	for name, want := range map[string]uint32{"root": 0, "0": 0, "4242": 4242, "4294967294": 4294967294} {
		if all, err := assemble.LocalUsers([]string{name}); err != nil || len(all) != 1 || all[0].UID != want {
			t.Errorf("%s: %+v, %v", name, all, err)
		}
	}
	for _, name := range []string{"", "nobody-of-that-name", "-1", "+0", "0x0", "4294967295", "4294967296", "18446744073709551616"} {
		if all, err := assemble.LocalUsers([]string{name}); tunnel.CodeOf(err) != tunnel.ConfigInvalid {
			t.Errorf("%q: %+v, %v", name, all, err)
		}
	}
}
