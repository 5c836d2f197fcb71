"""A rank that is importing for ever, in C: as if torch took that long."""

from parallel_program import wait_for_peer

wait_for_peer()
