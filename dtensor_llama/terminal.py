"""The terminal of a run: stdout and stderr that cannot end it, and Ctrl-C before main begins.

Training takes days, and its output may have no reader any more: a pipe that is closed (`| head -1`), a closed
terminal, a full disk under a redirected log, an encoding without the character to be printed. None of these
may stop training. This module imports neither torch nor anything else that takes time.
"""

import contextlib
import io
import os
import select
import signal
import sys
from collections.abc import Callable

Say = Callable[[str], None]  # prints a line of a run, on the rank that prints
STDOUT, STDERR = 1, 2


class LastingStream(io.RawIOBase):
    """Writes to stdout or stderr. Output that can no longer be written is dropped, after one note on stderr.

    Where the output is the result of a program (`required`), the error is raised instead."""

    def __init__(self, fd: int, required: bool):
        super().__init__()
        self.fd, self.required = fd, required
        self.failed = False

    def writable(self) -> bool:
        return True

    def fileno(self) -> int:
        return self.fd

    def isatty(self) -> bool:
        return os.isatty(self.fd)

    def write(self, data) -> int:
        while not self.failed:
            try:
                return os.write(self.fd, data)
            except BlockingIOError:  # another program has made the terminal non-blocking
                select.select([], [self.fd], [])
            except OSError as error:
                self.failed = True
                if self.required:
                    raise
                self._note_failure(error)
        return len(data)

    def _note_failure(self, error: OSError) -> None:
        if self.fd == STDERR:
            return  # there is no stream left to write to
        with contextlib.suppress(OSError):
            note = f"note: stdout can no longer be written ({error.strerror}); the run goes on without it\n"
            os.write(STDERR, note.encode())


def make_streams_last(stdout_is_result: bool = False) -> None:
    """Replace sys.stdout and sys.stderr by streams to which print never raises, neither for an encoding nor
    for a lost reader.

    stdout_is_result: the program exists for what it prints, so a stdout that cannot be written raises
        OSError. Characters that the encoding lacks are written as escapes. Streams that a test or a notebook
        has set stay."""
    _fill_closed_descriptors()
    for name, fd in (("stdout", STDOUT), ("stderr", STDERR)):
        stream = getattr(sys, name)
        if stream is None:  # it was closed before Python began
            encoding, is_terminal = "utf-8", False
        elif stream is getattr(sys, f"__{name}__") and _fileno(stream) == fd:
            with contextlib.suppress(OSError, ValueError):
                stream.flush()
            encoding, is_terminal = stream.encoding, stream.isatty()
        else:
            continue
        raw = LastingStream(fd, required=stdout_is_result and fd == STDOUT)
        text = io.TextIOWrapper(
            io.BufferedWriter(raw),
            encoding,
            errors="backslashreplace",
            line_buffering=is_terminal or fd == STDERR,
        )
        setattr(sys, name, text)
    if sys.stdin is not None and sys.stdin is sys.__stdin__:
        # Bytes that are not text are kept, and refused where they are used.
        sys.stdin.reconfigure(errors="surrogateescape")


def _fileno(stream) -> int | None:
    try:
        return stream.fileno()
    except (OSError, ValueError):  # a closed stream, or one in memory
        return None


def _fill_closed_descriptors() -> None:
    """Open those of the descriptors 0, 1 and 2 that are closed. Otherwise the next file to be opened would
    take their number, and receive what is printed."""
    while True:
        fd = os.open(os.devnull, os.O_RDWR)
        if fd > STDERR:
            os.close(fd)
            return


def stdout_speaks_utf8() -> bool:
    return (getattr(sys.stdout, "encoding", None) or "utf-8").lower().replace("_", "-") in ("utf-8", "utf8")


def end_quietly_on_ctrl_c() -> None:
    """Make Ctrl-C end the process without a traceback, until main begins.

    A recipe calls this before its imports, which take seconds."""
    # Another handler means that the parent process ignores Ctrl-C, and this process shall do so too.
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, _end_quietly)


def hear_ctrl_c_again() -> None:
    """Make Ctrl-C raise KeyboardInterrupt again, as in any Python program."""
    if signal.getsignal(signal.SIGINT) is _end_quietly:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def _end_quietly(number: int, frame) -> None:
    with contextlib.suppress(OSError):
        os.write(STDERR, b"interrupted\n")
    os._exit(130)
