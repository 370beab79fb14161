"""Reads gzip, zstd, bzip2 and xz files as streams of bytes; a zstd frame may have any window size."""

import contextlib
import importlib
import io
import shlex
import shutil
import subprocess
from pathlib import Path

import pyarrow as pa

from dtensor_llama.errors import UsageError

COMPRESSIONS = {".gz": "gzip", ".zst": "zstd", ".bz2": "bz2", ".xz": "xz"}
PYTHON_MODULES = {"bz2": ("bz2", "bzip2"), "xz": ("lzma", "xz")}  # compression: (module, program)
ZSTD_MAGIC = b"\x28\xb5\x2f\xfd"
# The library lets a frame refer back to this many bytes of text; `zstd --long=28` and above need more.
USUAL_WINDOW = 1 << 27
NEEDS_WINDOW = "requires too much memory"  # a part of the library's error message for such a frame
UNPACK_ERRORS = (OSError, EOFError)
with contextlib.suppress(ImportError):  # Python can be built without it
    from lzma import LZMAError

    UNPACK_ERRORS += (LZMAError,)
with contextlib.suppress(ImportError):
    from zstandard import ZstdError

    UNPACK_ERRORS += (ZstdError,)


def open_compressed(path: Path, file, compression: str | None):
    """Return a stream with read(n) that gives the decompressed bytes of `file`.

    path: the name of the file. file: the same file, opened for reading bytes. compression: a value of
    COMPRESSIONS, or None. Raises UsageError if nothing on this machine can decompress it."""
    if compression is None:
        return file
    if compression in PYTHON_MODULES:
        module, program = PYTHON_MODULES[compression]
        try:
            return importlib.import_module(module).open(file)
        except ImportError:
            raise UsageError(
                f"{path}: this Python was built without {compression}; unpack the file with {program} -d, "
                "or use another Python."
            ) from None
    if compression == "zstd" and _zstd_window(file) > USUAL_WINDOW:
        return _open_long_zstd(path, file)
    return pa.CompressedInputStream(pa.PythonFile(file, mode="r"), compression)


def long_window_error(path: Path) -> UsageError:
    """Return the error for a file that `zstd --long` has written and that cannot be decompressed here."""
    return UsageError(
        f"{path}: the file was compressed with zstd --long, and unpacking it takes the package zstandard or "
        "the program zstd; install one of them (pip install zstandard), or write the file anew: "
        f"zstd -dc --long=31 {shlex.quote(path.name)} | zstd -o another.zst."
    )


def _zstd_window(file) -> int:
    """Return the window size in bytes that the first frame needs, or 0 for any other kind of frame.

    Source: RFC 8878, section 3.1.1."""
    head = file.read(14)
    file.seek(0)
    if len(head) < 6 or not head.startswith(ZSTD_MAGIC):
        return 0
    descriptor = head[4]
    if descriptor & 0x20:  # a single segment: the window is as large as the content
        at = 5 + (0, 1, 2, 4)[descriptor & 3]
        n_bytes = (1, 2, 4, 8)[descriptor >> 6]
        return int.from_bytes(head[at : at + n_bytes], "little") + (256 if n_bytes == 2 else 0)
    base = 1 << (10 + (head[5] >> 3))
    return base + base // 8 * (head[5] & 7)


def _open_long_zstd(path: Path, file):
    try:
        import zstandard
    except ImportError:
        if shutil.which("zstd") is None:
            raise long_window_error(path) from None
        return _ZstdProgram(path)
    return zstandard.ZstdDecompressor(max_window_size=1 << 31).stream_reader(file, read_across_frames=True)


class _ZstdProgram(io.RawIOBase):
    """Reads the output of the program zstd, which decompresses a file."""

    def __init__(self, path: Path):
        command = ["zstd", "-dcq", "--long=31", "--", str(path)]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)

    def read(self, n_bytes: int = -1) -> bytes:
        data = self.process.stdout.read(n_bytes)
        if (not data or n_bytes < 0) and self.process.poll() != 0:
            message = self.process.stderr.read().decode(errors="replace").strip()
            if self.process.wait() != 0:
                raise OSError(message or f"zstd ended with status {self.process.returncode}")
        return data

    def close(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()
        self.process.stdout.close()
        self.process.stderr.close()
        super().close()
