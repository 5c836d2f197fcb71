"""The hotloop command: one module per verb.

``app`` holds ``main`` and the list of verbs; ``options`` the options that verbs share, one class
for each value of ``types`` that they make; ``output`` and ``stream`` how things are shown.
Everything a verb does is done by the floors below: what stands here is only about a command line.

A verb's module, and what it imports at its top, must stay light: its help page and its usage
errors need it. torch, numpy and pydantic come in when the verb runs.
"""
