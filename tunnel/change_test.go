package tunnel

import "testing"

func TestAChangeIsALine(t *testing.T) {
	for want, c := range map[string]Change{
		"datagrams sealed -> lanes: udp_blocked, why; 655ms without a datagram, 31 lost on their way to the apps, some 28 lost on their way from the apps": {
			What: ChangedDatagrams, From: "sealed", To: "lanes", Cause: UDPBlocked, Why: "why", Gap: 655e6, Lost: 31, LostUp: 28,
		},
		"datagrams lanes -> nothing: path_lost":   {What: ChangedDatagrams, From: "lanes", Cause: PathLost},
		"datagrams nothing -> lanes: path_joined": {What: ChangedDatagrams, To: "lanes", Cause: PathJoined},
		"carrier quic is gone: timed_out":         {What: ChangedCarrier, From: "quic", Cause: TimedOut},
		"carrier quic is there: path_joined":      {What: ChangedCarrier, To: "quic", Cause: PathJoined},
	} {
		if got := c.String(); got != want {
			t.Errorf("%q; want %q", got, want)
		}
	}
}
