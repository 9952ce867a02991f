package assemble

import (
	"context"
	"errors"
	"log/slog"

	"github.com/vishvananda/netlink/nl"
	"golang.org/x/sys/unix"
)

// watchChanges calls changed whenever this host's addresses, links or routes
// have changed, until ctx ends. It needs no privileges.
func watchChanges(ctx context.Context, changed func(), log *slog.Logger) {
	s, err := nl.Subscribe(unix.NETLINK_ROUTE, unix.RTNLGRP_LINK,
		unix.RTNLGRP_IPV4_IFADDR, unix.RTNLGRP_IPV4_ROUTE, unix.RTNLGRP_IPV6_IFADDR, unix.RTNLGRP_IPV6_ROUTE)
	if err != nil {
		log.Warn("the system does not tell when addresses and routes change; a call notices by silence", "why", err)
		return
	}
	unhook := context.AfterFunc(ctx, s.Close)
	defer unhook()
	for {
		_, _, err := s.Receive()
		switch {
		case ctx.Err() != nil:
			return
		case err == nil, errors.Is(err, unix.ENOBUFS): // the second: there were too many
			changed()
		case errors.Is(err, unix.EAGAIN), errors.Is(err, unix.EINTR):
		default:
			log.Warn("the system does not tell any more when addresses and routes change; a call notices by silence", "why", err)
			s.Close()
			return
		}
	}
}
