"""Policies, scenes, data sets and rewards. Everything here runs without torch."""

import contextlib
import os
import shlex
import shutil
import sys
from fnmatch import fnmatch

LONGEST = 1000  # characters of an error line: what is wrong stands at its start, what was expected at its end


def plain(text, most=LONGEST):
    """A text in one line that a terminal shows and does not obey: control characters escaped, its middle cut."""
    text = " ".join(str(text).split())  # cut before the escaping, too: 40 MB of it would take as long as the run
    text = text if len(text) <= most else f"{text[: most * 2 // 3]} [...] {text[-most // 4 :]}"
    text = "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)
    return text if len(text) <= most else f"{text[: most * 2 // 3]} [...] {text[-most // 4 :]}"


class InputError(ValueError):
    """A file, flag or value from outside that cannot be used: says what was found, what was expected, and where."""

    def __init__(self, text=""):
        super().__init__(plain(text))


def refuse_strangers(folder, own=(), flag="--out", unless=""):
    """Raise InputError where a folder holds names that fit none of the patterns `own`, which we write there.

    unless: said in brackets, when they may be ours all the same.
    """
    names = sorted(os.listdir(folder)) if os.path.isdir(folder) else []
    names = [name for name in names if not any(fnmatch(name, pattern) for pattern in own)]
    if names:
        more = f" and {len(names) - 1} more" if len(names) > 1 else ""
        expected = "expected a new or empty folder"
        raise InputError(f"{flag} {folder}: found {names[0]}{more}, which we did not write{unless}, {expected}")


MADE = ".made"  # says which command has made a folder


def claim(folder, command, own, fresh=False):
    """Make a folder for a command's files, `own` (patterns), or go on in one that it made -> does it hold any?

    fresh: delete those. Raises InputError in a folder of somebody else's, or where a name in it is not of `own`.
    """
    mark, ours = os.path.join(folder, MADE), False
    if os.path.isfile(mark):
        with open(mark, encoding="utf-8", errors="replace") as file:
            ours = file.read(200) == f"{command}\n"
    refuse_strangers(folder, (MADE, *own))
    if not ours:
        older = f" (if {command} did, before it marked its folders: echo {command} > {shlex.quote(mark)})"
        refuse_strangers(folder, unless=older)
    if fresh:
        shutil.rmtree(folder, ignore_errors=True)
    os.makedirs(folder, exist_ok=True)
    write_text(mark, f"{command}\n")
    return os.listdir(folder) != [MADE]


GENERATOR = '<meta name="generator" content="trimpi">'  # in every page of ours


def check_file(path, ours, flag="--out"):
    """Raise InputError where a file to be written would replace one without the text `ours`, which such ones hold."""
    if os.path.isfile(path):
        with open_text(path, errors="replace") as file:
            if ours in file.read(1 << 20):
                return
    if os.path.lexists(path):
        raise InputError(f"{flag} {path}: found something that this command did not write, expected a new file")


def open_text(path, **how):
    """A file to be read as text in UTF-8, without its BOM. A pipe might never answer, and a device never end."""
    if os.path.exists(path) and not os.path.isfile(path) and not os.path.isdir(path):
        raise InputError(f"{path}: found something else than a regular file, expected a file")
    return open(path, encoding="utf-8-sig", **how)


def write_text(path, text, synced=False):
    """Write a text file whole: a reader sees the old file or the new one, never half of one; synced: it is on disk."""
    aside = f"{path}.{os.getpid()}.tmp"
    try:
        with open(aside, "w", encoding="utf-8", errors="replace") as file:
            file.write(text)
            if synced:
                file.flush()
                os.fsync(file.fileno())
        os.replace(aside, path)
    except OSError:
        with contextlib.suppress(OSError):
            os.unlink(aside)
        raise


class Lasting:
    """sys.stdout or sys.stderr whose reader may go (`| head`, a closed terminal): from then on prints go nowhere."""

    def __init__(self, stream):
        self.stream = stream

    def __getattr__(self, name):
        return getattr(self.stream, name)

    def write(self, text):
        try:
            return self.stream.write(text)
        except (OSError, ValueError):
            self.let_go()

    def flush(self):
        try:
            self.stream.flush()
        except (OSError, ValueError):
            self.let_go()

    def let_go(self):
        with contextlib.suppress(OSError, ValueError):  # ValueError: somebody has closed it
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self.stream.fileno())  # what is still buffered, and what libraries print, goes there, too
            os.close(nowhere)


@contextlib.contextmanager
def lasting_output():
    """No print within ends what it reports on."""
    before = sys.stdout, sys.stderr
    while (descriptor := os.open(os.devnull, os.O_RDWR)) < 3:  # `>&-`: a file opened later must not become stdout
        os.set_inheritable(descriptor, True)
    os.close(descriptor)
    for name in "stdout", "stderr":
        stream = getattr(sys, name) or open(os.devnull, "w")
        with contextlib.suppress(AttributeError):  # a stand-in of the caller's
            stream.reconfigure(errors="backslashreplace")
        setattr(sys, name, Lasting(stream))
    try:
        yield
    finally:
        sys.stdout.flush()
        sys.stdout, sys.stderr = before


def command(main):
    """Run a command's `main()`: an InputError or a full disk ends it in one line and exit code 2.

    TRIMPI_TRACEBACK=1 shows the whole traceback instead, for those who debug their own code.
    """
    with lasting_output():
        try:
            main()
        except KeyboardInterrupt:
            print("interrupted", file=sys.stderr)
            sys.exit(130)
        except (InputError, OSError) as error:
            if os.environ.get("TRIMPI_TRACEBACK"):
                raise
            print(f"error: {plain(error)}", file=sys.stderr)
            sys.exit(2)
