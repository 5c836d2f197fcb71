"""The command line: one module per command.

``app`` has ``main`` and the list of commands. ``options`` has the options that commands share, with
one class for each type of ``types`` that they make. ``output`` and ``stream`` print. Other packages
do the work of a command; this one only handles the command line.

The module of a command, with its imports at the top, must load quickly, since its usage errors need
it. torch, numpy and pydantic are imported when the command runs.
"""
