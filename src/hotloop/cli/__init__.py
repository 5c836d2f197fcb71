"""The command line: one module per command.

``app`` has ``main`` and the list of commands. ``options`` has the options that commands share, with
one class for each type of ``types`` that they make. ``output`` and ``stream`` print. Other packages
do the work of a command; this one only handles the command line.

The module of a command must be imported quickly: a usage error of the command needs the module, but
not the packages with which the command works. So torch, numpy and pydantic are imported when the
command runs.
"""
