package main

import (
	"fmt"
	"strconv"
	"strings"
	"time"
)

// settings are what the link does now. They are never changed, only replaced.
type settings struct {
	delay, jitter time.Duration
	loss          float64 // 0 to 1
	burst         float64 // mean length of a run of lost packets; from 1
	rate          float64 // bits a second; 0: no limit
	queue         time.Duration
	noUDP, noTCP  bool
	down          bool
}

var defaults = settings{burst: 1, queue: 200 * time.Millisecond}

// change returns s with the words' settings, as in "delay=20ms loss=1", or an
// error and s as it was.
func (s settings) change(words string) (settings, error) {
	next := s
	for _, word := range strings.Fields(words) {
		name, value, ok := strings.Cut(word, "=")
		if !ok {
			return s, fmt.Errorf("%q is not NAME=VALUE", word)
		}
		if err := next.set(name, value); err != nil {
			return s, fmt.Errorf("%s: %w", name, err)
		}
	}
	return next, nil
}

func (s *settings) set(name, value string) (err error) {
	switch name {
	case "delay":
		s.delay, err = duration(value)
	case "jitter":
		s.jitter, err = duration(value)
	case "queue":
		s.queue, err = duration(value)
	case "loss":
		s.loss, err = number(value, 0, 100)
		s.loss /= 100
	case "burst":
		s.burst, err = number(value, 1, 1e6)
	case "rate":
		s.rate, err = number(value, 0, 1e6)
		s.rate *= 1e6
	case "udp":
		s.noUDP, err = off(value)
	case "tcp":
		s.noTCP, err = off(value)
	case "down":
		s.down, err = off(value)
		s.down = !s.down
	default:
		err = fmt.Errorf("there is no such setting")
	}
	return err
}

func duration(s string) (time.Duration, error) {
	d, err := time.ParseDuration(s)
	if err == nil && d < 0 {
		err = fmt.Errorf("%s is below 0", s)
	}
	return d, err
}

func number(s string, least, most float64) (float64, error) {
	f, err := strconv.ParseFloat(s, 64)
	if err == nil && !(f >= least && f <= most) {
		err = fmt.Errorf("%s is not between %g and %g", s, least, most)
	}
	return f, err
}

func off(s string) (bool, error) {
	switch s {
	case "on":
		return false, nil
	case "off":
		return true, nil
	}
	return false, fmt.Errorf("%q is neither on nor off", s)
}
