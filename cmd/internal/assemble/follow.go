package assemble

import (
	"context"
	"os"
	"os/signal"
	"syscall"
	"time"
)

// followEvery is how often files are looked at. What has changed is read when it
// has stood unchanged for one look, since editors write in pieces: at most a
// second after the last change.
const followEvery = 500 * time.Millisecond

// follow calls changed when one of the files is another than it was at known,
// which stamps took before they were read, and with asked when somebody asks, until ctx ends. files is asked anew each time, as
// what changed reads may name others. A file that is missing for a moment is not
// news by itself; nothing that it holds is looked at here.
//
// It polls: a configuration may be a link that is switched (Kubernetes), lie on a
// network's file system, or be replaced with its folder, which notifications of
// the kernel all have to be told of.
func follow(ctx context.Context, known map[string]os.FileInfo, files func() []string, ask <-chan struct{}, changed func(asked bool)) {
	var last map[string]os.FileInfo
	t := time.NewTicker(followEvery)
	defer t.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-ask:
			now := stamps(files())
			changed(true)
			known, last = now, nil
		case <-t.C:
			now := stamps(files())
			if differs(now, known) && last != nil && !differs(now, last) {
				changed(false)
				known = now
			}
			last = now
		}
	}
}

// stamps are what tells that a file has been written or replaced.
func stamps(files []string) map[string]os.FileInfo {
	m := make(map[string]os.FileInfo, len(files))
	for _, f := range files {
		if f == "" {
			continue
		}
		if st, err := os.Stat(f); err == nil {
			m[f] = st
		}
	}
	return m
}

// differs reports whether a file of now is new, or another than before.
func differs(now, before map[string]os.FileInfo) bool {
	for f, a := range now {
		b, there := before[f]
		if !there || a.Size() != b.Size() || !a.ModTime().Equal(b.ModTime()) || !os.SameFile(a, b) {
			return true
		}
	}
	return false
}

// OnHangup calls reload for each SIGHUP until ctx ends or the returned function
// is called. In a terminal it does nothing: there the signal says that the
// terminal has been closed, which ends a process as ever.
func OnHangup(ctx context.Context, reload func()) (stop func()) {
	if inTerminal() {
		return func() {}
	}
	hangup := make(chan os.Signal, 1)
	signal.Notify(hangup, syscall.SIGHUP)
	ctx, cancel := context.WithCancel(ctx)
	done := make(chan struct{})
	go func() {
		defer close(done)
		for {
			select {
			case <-hangup:
				reload()
			case <-ctx.Done():
				return
			}
		}
	}()
	return func() {
		signal.Stop(hangup)
		cancel()
		<-done
	}
}

// inTerminal reports whether standard input is a device that somebody may type
// at: one that is not the null device.
func inTerminal() bool {
	in, err := os.Stdin.Stat()
	if err != nil || in.Mode()&os.ModeCharDevice == 0 {
		return false
	}
	null, err := os.Stat(os.DevNull)
	return err != nil || !os.SameFile(in, null)
}
