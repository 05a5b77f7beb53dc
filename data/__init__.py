"""Policies, scenes, data sets and rewards. Everything here runs without torch."""

import os
import sys


class InputError(ValueError):
    """A file, flag or value from outside that cannot be used: says what was found, what was expected, and where."""


def command(main):
    """Run a command's `main()`: an InputError or a full disk ends it in one line and exit code 2.

    TRIMPI_TRACEBACK=1 shows the whole traceback instead, for those who debug their own code.
    """
    try:
        main()
    except BrokenPipeError:  # `command | head`: nobody reads on, nothing went wrong
        sys.stderr.close()
    except (InputError, OSError) as error:
        if os.environ.get("TRIMPI_TRACEBACK"):
            raise
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(2)
