"""``python -m hotloop``: the same as the ``hotloop`` command."""

from hotloop.cli.app import main

raise SystemExit(main())
