package session

import (
	"testing"

	"culvert/tunnel/media"
	"culvert/tunnel/tunneltest"
)

func TestTheConnectionIDsOfSealedPacketsAreClaimedBeforeTheWelcome(t *testing.T) {
	client, server := tunneltest.Pair(t, tunneltest.Config{Flow: true}, nil)
	how := OfferSealed(media.PreferredAEADs())
	ready, err := ReadySealed(server, "0102", how)
	if err != nil || ready == nil {
		t.Fatalf("%v, %v", ready, err)
	}
	c, err := server.Carrier()
	if err != nil {
		t.Fatal(err)
	}
	if _, err := ReadySealed(c, "0102", how); err == nil {
		t.Error("the IDs could be claimed again on the carrier")
	}
	ready.Close()
	again, err := ReadySealed(c, "0102", how)
	if err != nil {
		t.Errorf("after the end: %v", err)
	}
	again.Close()
	client.Close()
	c.Close(nil)
}

func TestAConnectionWithoutAFlowHasNoSealedPackets(t *testing.T) {
	client, server := tunneltest.Pair(t, tunneltest.Config{Kind: "tls"}, nil)
	if s, err := ReadySealed(server, "0102", OfferSealed(media.PreferredAEADs())); s != nil || err != nil {
		t.Errorf("%v, %v", s, err)
	}
	client.Close()
	server.Close()
}
