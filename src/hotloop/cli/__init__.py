"""The command line: one module per command.

``app`` holds ``main`` and the list of commands; ``options`` the options that commands share, one
class for each value of ``types`` that they make; ``output`` and ``stream`` print. The work of a
command is done by the packages below: this one only handles the command line.

The module of a command, and what it imports at its top, must stay light: its help page and its
usage errors need it. torch, numpy and pydantic are imported when the command runs.
"""
