"""A rank whose import never ends, in C, as if it imported torch."""

from parallel_program import wait_for_peer

wait_for_peer()
