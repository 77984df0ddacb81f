"""``python -m holdfast.cli``: the same as the ``holdfast`` command."""

from . import main

if __name__ == "__main__":
    raise SystemExit(main())
