import signal

# A shell without job control has what it starts in the background ignore Ctrl-C, and what that
# starts in turn. Several tests are about Ctrl-C.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
